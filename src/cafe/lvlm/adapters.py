"""Adapters by PEFT: small matrices trained beside frozen weights (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353).

A model with an adapter keeps its Hugging Face class, with PEFT's layers in place of those adapted, so that nothing else
needs to know. Adapters are loaded by PEFT's functions and not by transformers' `from_pretrained`, which drops what DoRA
adds to LoRA (transformers 5.23).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from cafe.errors import CheckpointError, MissingPackageError, RecipeError, load_error
from cafe.lvlm.families import PartName, model_part
from cafe.lvlm.hub import ensure_exists
from cafe.utils.ranges import Above, HalfOpen

if TYPE_CHECKING:
    from peft import PeftConfig

ADAPTER_NAME = "default"  # PEFT's name for a model's only adapter
SAVED_PREFIX = "base_model.model."  # PEFT's prefix of the names in a file


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Configure LoRA: the weight W of an adapted layer becomes W + alpha / rank * B A, of which B and A are trained.

    Attributes:
        rank: rows of A and columns of B.
        alpha: scale of the update.
        dropout: dropout on the input of A in training (0 to 1).
        dora: train the norm of each row of W apart from its direction.
        language_model, projector, vision_tower: names of the part's linear layers to adapt, as in [q_proj, v_proj], or
            [all]; null leaves the part unchanged.
    """

    rank: Annotated[int, Above(0)] = 16
    alpha: Annotated[float, Above(0)] = 32.0
    dropout: Annotated[float, HalfOpen(0, 1)] = 0.0
    dora: bool = False
    language_model: tuple[str, ...] | None = ("all",)
    projector: tuple[str, ...] | None = None
    vision_tower: tuple[str, ...] | None = None


def add_adapter(lvlm: PreTrainedModel, adapter: LoraSettings) -> None:
    """Freeze a model and add an adapter that changes nothing yet.

    The adapter is trained in float32, whatever the dtype of the model's weights.

    Raises:
        MissingPackageError: PEFT is not installed.
        RecipeError: the model has an adapter already, or no layer has a given name.
    """
    _require_peft()
    from peft import LoraConfig  # here, because PEFT is optional and slow to import

    if has_adapter(lvlm):
        raise RecipeError(f"{lvlm.name_or_path} has an adapter already: `cafe merge` makes a plain checkpoint of both.")
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.dora,
        target_modules=find_target_modules(lvlm, adapter),
    )
    _inject(lvlm, config)
    # The adapter is saved elsewhere, where a relative path would mean another directory.
    base = Path(lvlm.name_or_path)
    config.base_model_name_or_path = str(base.resolve() if base.is_dir() else base)


def find_target_modules(lvlm: PreTrainedModel, adapter: LoraSettings) -> list[str]:
    """Find the linear layers that an adapter is for, by name.

    Raises:
        RecipeError: a part has no layer of a given name.
    """
    # In this order, which is that of the saved configuration.
    wanted: dict[PartName, tuple[str, ...] | None] = {
        "language_model": adapter.language_model,
        "projector": adapter.projector,
        "vision_tower": adapter.vision_tower,
    }
    layers = _linear_layers(lvlm)
    targets: list[str] = []
    for part, names in wanted.items():
        if not names:
            continue
        _check_layer_names(part, names, layers[part], lvlm.config.model_type)
        if "all" in names:
            targets += layers[part]
        else:
            targets += [layer for layer in layers[part] if _last_name(layer) in names]
    if not targets:
        raise RecipeError("model.adapter names no layer of any part.")
    return targets


def _linear_layers(lvlm: PreTrainedModel) -> dict[PartName, list[str]]:
    """Return the names of the linear layers of each part that can be adapted."""
    modules = dict(lvlm.named_modules())
    head = lvlm.get_output_embeddings()
    layers: dict[PartName, list[str]] = {part: [] for part in get_args(PartName)}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        # PyTorch's own attention reads the weights of its layers without calling them, so an adapter would be skipped;
        # the losses read those of the head in the same way.
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, nn.MultiheadAttention):
            continue
        part = model_part(f"{name}.", lvlm.config.model_type)
        layers[part].append(name)
    return layers


def _check_layer_names(part: PartName, names: Sequence[str], layers: Sequence[str], model_type: str) -> None:
    """Refuse names that no linear layer of the part has, and parts without linear layers.

    Raises:
        RecipeError: no layer has one of the names, or there is no layer at all.
    """
    known = {_last_name(layer) for layer in layers}
    for name in names:
        if name == "all" or name in known:
            continue
        listed = ", ".join(sorted(known)) or "none"
        raise RecipeError(f"model.adapter.{part}: no linear layer is called {name!r}; there are {listed}.")
    if not layers:
        raise RecipeError(f"model.adapter.{part}: a {model_type} model has no linear layer there.")


def _last_name(layer: str) -> str:
    """Return the name that a layer has in its own module, such as q_proj."""
    return layer.rpartition(".")[2]


def has_adapter(lvlm: PreTrainedModel) -> bool:
    """Tell whether a model has an adapter."""
    return bool(getattr(lvlm, "_hf_peft_config_loaded", False))


def is_adapter(path: str | Path) -> bool:
    """Tell whether a directory or Hub id holds an adapter.

    Raises:
        CheckpointError: there is no such directory, nor a model of that name on the Hub.
    """
    ensure_exists(path)
    return find_adapter_config_file(str(path)) is not None


def read_adapter_config(path: str | Path) -> "PeftConfig | None":
    """Read the configuration of the adapter in a directory or under a Hub id; None if there is something else.

    Raises:
        MissingPackageError: there is an adapter and PEFT is not installed.
        CheckpointError: its configuration is damaged.
    """
    if not is_adapter(path):
        return None
    _require_peft()
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(path))
    except Exception as error:  # the file may hold anything, and PEFT raises whatever it runs into
        raise load_error("adapter", path, error) from error


def load_adapter(lvlm: PreTrainedModel, path: str | Path, config: "PeftConfig") -> None:
    """Add a saved adapter to its base model.

    Raises:
        CheckpointError: its weights are missing, damaged or for another model.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    base = config.base_model_name_or_path  # transformers overwrites it
    _inject(lvlm, config)
    config.base_model_name_or_path = base
    try:
        weights: dict[str, Any] = load_peft_weights(str(path), device=str(lvlm.device))
    except (OSError, ValueError, SafetensorError) as error:
        raise load_error("adapter", path, error) from error
    unprefixed = {name.removeprefix(SAVED_PREFIX): tensor for name, tensor in weights.items()}
    result = set_peft_model_state_dict(lvlm, unprefixed, ADAPTER_NAME)
    # The base's own weights count as missing too: a file holds the adapter's alone.
    missing = [name for name in result.missing_keys if "lora_" in name or ADAPTER_NAME in name.split(".")]
    if missing or result.unexpected_keys:
        name = (missing or result.unexpected_keys)[0]
        raise CheckpointError(f"The adapter {path} does not fit {lvlm.name_or_path}: {name}.")
    lvlm.requires_grad_(False)


def merge(lvlm: PreTrainedModel, dtype: torch.dtype | None = None) -> float:
    """Add the adapter to the weights, in place, and remove it.

    Each sum is computed in float32 or wider and rounded to the dtype of the weight. Where that has 16 bits, much of a
    small change is lost.

    Args:
        lvlm: the model.
        dtype: convert all weights to this first; None leaves each in its own.

    Returns:
        How much of the adapter's change is kept: with D the change of a weight before rounding and R the one after it,
        the sum of <R, D> over all weights, divided by that of <D, D>. 1 is all of it.

    Raises:
        CheckpointError: the model's weights are quantized.
    """
    if getattr(lvlm, "is_quantized", False):
        raise CheckpointError(
            f"The weights of {lvlm.name_or_path} are quantized, and no adapter can be merged into them without loss: "
            "merge it into the model that they were quantized from."
        )
    if dtype is not None:
        lvlm.to(dtype)
    kept, total = 0.0, 0.0
    for name, module in _adapted_modules(lvlm):
        merged, kept_here, total_here = _merge_module(module)
        kept, total = kept + kept_here, total + total_here
        lvlm.set_submodule(name, merged)
    # What transformers keeps of an adapter beside its layers.
    del lvlm.peft_config
    lvlm._hf_peft_config_loaded = False
    _untie_if_different(lvlm)
    if not total:
        return 1.0
    return kept / total


def _untie_if_different(lvlm: PreTrainedModel) -> None:
    """Let the configuration say so where the adapter held a head of its own beside the embeddings."""
    head = lvlm.get_output_embeddings()
    if head is None or head.weight is lvlm.get_input_embeddings().weight:
        return
    for config in (lvlm.config, lvlm.config.get_text_config()):
        config.tie_word_embeddings = False


def _adapted_modules(lvlm: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Return PEFT's modules, the outermost ones, with their names.

    They are layers with matrices beside them, and wrappers of modules that the adapter holds as a whole
    (`modules_to_save`) or of some rows of an embedding.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: list[tuple[str, nn.Module]] = []
    # Modules come from the outside in.
    for name, module in lvlm.named_modules():
        is_inner = found and name.startswith(f"{found[-1][0]}.")
        if not is_inner and isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            found.append((name, module))
    return found


def _merge_module(module: Any) -> tuple[nn.Module, float, float]:
    """Merge one of PEFT's modules; return the plain module, and the sums of <R, D> and <D, D> (see `merge`)."""
    is_wrapper = hasattr(module, "original_module")
    base = module.original_module if is_wrapper else module.get_base_layer()
    dtype = next(base.parameters()).dtype
    module.to(torch.promote_types(dtype, torch.float32))
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    if hasattr(module, "unload_and_optionally_merge_module"):
        merged: nn.Module = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    else:
        module.merge()
        merged = module.get_base_layer()

    change = {name: parameter.detach() - before[name] for name, parameter in merged.named_parameters()}
    merged.to(dtype)
    kept, total = 0.0, 0.0
    for name, parameter in merged.named_parameters():
        kept += float(((parameter.detach() - before[name]) * change[name]).sum())
        total += float(change[name].square().sum())
    return merged, kept, total


def _inject(lvlm: PreTrainedModel, config: "PeftConfig") -> None:
    """Put PEFT's layers in place of those that an adapter is for."""
    from peft.functional import cast_adapter_dtype

    lvlm.add_adapter(config, ADAPTER_NAME)
    # Small updates would be lost in 16 bits.
    cast_adapter_dtype(lvlm, ADAPTER_NAME, autocast_adapter_dtype=True)


def _require_peft() -> None:
    """Raise an error with the pip command where PEFT is not installed."""
    if not find_spec("peft"):
        raise MissingPackageError("An adapter needs the package peft: pip install 'cafe-lvlm[peft]'.")
