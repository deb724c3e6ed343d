"""Adapters through PEFT: small matrices trained beside frozen weights (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353).

A model with an adapter stays the Hugging Face class that it was, with PEFT's layers in the place of those adapted, so
that what reads a model need not know. Adapters are loaded by PEFT's functions and not by transformers' own
`from_pretrained`, which drops what DoRA adds to LoRA (transformers 5.23).
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from cafe.errors import CafeError, load_error
from cafe.lvlm.families import PartName, model_part
from cafe.utils.ranges import Above, HalfOpen

if TYPE_CHECKING:
    from peft import PeftConfig

NAME = "default"  # PEFT's, of a model's only adapter
PREFIX = "base_model.model."  # what PEFT puts before the names in a file


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """LoRA: the weight W of an adapted layer becomes W + alpha / rank * B A, of which B and A are trained.

    Attributes:
        rank: rows of A and columns of B.
        alpha: weighs the update.
        dropout: of what goes into A in training (0 to 1).
        dora: train the length of each of W's rows apart from its direction.
        language_model, projector, vision_tower: names of this part's linear layers to adapt, as in
            [q_proj, v_proj], or [all]; null leaves the part as it is.
    """

    rank: Annotated[int, Above(0)] = 16
    alpha: Annotated[float, Above(0)] = 32.0
    dropout: Annotated[float, HalfOpen(0, 1)] = 0.0
    dora: bool = False
    language_model: tuple[str, ...] | None = ("all",)
    projector: tuple[str, ...] | None = None
    vision_tower: tuple[str, ...] | None = None


def add_adapter(lvlm: PreTrainedModel, adapter: LoraSettings) -> None:
    """Freezes a model and puts an adapter into it that changes nothing yet.

    The adapter is trained in float32 whatever the model's weights are held in.

    Raises:
        CafeError: PEFT is not installed, the model has an adapter, or no layer bears a name given.
    """
    _require_peft()
    from peft import LoraConfig

    if has_adapter(lvlm):
        raise CafeError(f"{lvlm.name_or_path} has an adapter already: `cafe merge` makes a plain checkpoint of both.")
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.dora,
        target_modules=find_target_modules(lvlm, adapter),
    )
    _inject(lvlm, config)
    base = Path(lvlm.name_or_path)
    config.base_model_name_or_path = str(base.resolve() if base.is_dir() else base)


def find_target_modules(lvlm: PreTrainedModel, adapter: LoraSettings) -> list[str]:
    """The linear layers that an adapter is for, by name.

    Raises:
        CafeError: a part has no layer of a name given.
    """
    wanted: dict[PartName, tuple[str, ...] | None] = {
        "language_model": adapter.language_model,
        "projector": adapter.projector,
        "vision_tower": adapter.vision_tower,
    }
    modules = dict(lvlm.named_modules())
    own = {part: [] for part in wanted}  # type: dict[PartName, list[str]]
    for name, module in modules.items():
        # The head and what attention of PyTorch's own kind holds are read without a call that an adapter could join.
        held = isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention)
        if isinstance(module, nn.Linear) and module is not lvlm.get_output_embeddings() and not held:
            own[model_part(f"{name}.", lvlm.config.model_type)].append(name)
    found: list[str] = []
    for part, names in wanted.items():
        layers = {name: name.rpartition(".")[2] for name in own[part]}
        for name in names or ():
            if name != "all" and name not in layers.values():
                there = ", ".join(sorted(set(layers.values()))) or "none"
                raise CafeError(f"model.adapter.{part}: no linear layer is called {name!r}; there are {there}.")
        if names and not layers:
            raise CafeError(f"model.adapter.{part}: a {lvlm.config.model_type} model has no linear layer there.")
        found += [layer for layer, name in layers.items() if names and ("all" in names or name in names)]
    if not found:
        raise CafeError("model.adapter names no layer of any part.")
    return found


def has_adapter(lvlm: PreTrainedModel) -> bool:
    """Whether a model has one."""
    return bool(getattr(lvlm, "_hf_peft_config_loaded", False))


def read_adapter_config(path: str | Path) -> "PeftConfig | None":
    """The configuration of the adapter in a directory or under a Hub id; None where something else is there.

    Raises:
        CafeError: there is one and PEFT is not installed.
    """
    if Path(path).is_dir() and not (Path(path) / "adapter_config.json").is_file():
        return None
    if not find_adapter_config_file(str(path)):
        return None
    _require_peft()
    from peft import PeftConfig

    return PeftConfig.from_pretrained(str(path))


def load_adapter(lvlm: PreTrainedModel, path: str | Path, config: "PeftConfig") -> None:
    """Puts a saved adapter into its base model.

    Raises:
        CafeError: its weights are missing, damaged or not for this model.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    base = config.base_model_name_or_path
    _inject(lvlm, config)
    config.base_model_name_or_path = base
    try:
        weights: dict[str, Any] = load_peft_weights(str(path), device=str(lvlm.device))
    except (OSError, ValueError, SafetensorError) as error:
        raise load_error("adapter", path, error) from error
    named = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    result = set_peft_model_state_dict(lvlm, named, NAME)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        wrong = (missing or result.unexpected_keys)[0]
        raise CafeError(f"The adapter {path} does not fit {lvlm.name_or_path}: {wrong}.")
    lvlm.requires_grad_(False)


def merge(lvlm: PreTrainedModel) -> None:
    """Adds the adapter to the weights, in place, and takes it out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(lvlm.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            lvlm.set_submodule(name, module.get_base_layer())
    del lvlm.peft_config
    lvlm._hf_peft_config_loaded = False


def _inject(lvlm: PreTrainedModel, config: "PeftConfig") -> None:
    from peft.functional import cast_adapter_dtype

    lvlm.add_adapter(config, NAME)
    cast_adapter_dtype(lvlm, NAME, autocast_adapter_dtype=True)


def _require_peft() -> None:
    if not find_spec("peft"):
        raise CafeError("An adapter needs the package peft: pip install 'cafe-lvlm[peft]'.")
