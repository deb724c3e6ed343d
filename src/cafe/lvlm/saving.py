"""Write a model's weights, and make sure that the files hold what was trained."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from cafe.errors import CheckpointError
from cafe.lvlm.adapters import ADAPTER_NAME, SAVED_PREFIX, has_adapter
from cafe.utils.nonfinite import find_nonfinite

CONFIG_FILE = "config.json"


def save_lvlm(lvlm: PreTrainedModel, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a model's weights and configuration, or those of its adapter, as transformers and PEFT do.

    Args:
        lvlm: the model.
        directory: where its files go.
        weights: the model's state dict, if the model itself holds only a shard of it.

    Raises:
        CheckpointError: a weight is not finite, or the files lack a weight that was trained.
    """
    nonfinite = find_nonfinite(weights.items() if weights is not None else lvlm.named_parameters())
    if nonfinite is not None:
        raise CheckpointError(f"The weight {nonfinite} holds values that are not finite: the model was not saved.")
    lvlm.save_pretrained(directory, state_dict=weights)
    if not has_adapter(lvlm):
        _record_widest_dtype(lvlm, directory)
    if missing := unsaved_weights(lvlm, directory):
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise CheckpointError(
            f"The checkpoint would lack weights that were trained, {missing[0]}{others}: the model was not saved."
        )


def _record_widest_dtype(lvlm: PreTrainedModel, directory: Path) -> None:
    """Let the configuration name the widest dtype of the weights, in which transformers loads all of them.

    It names that of the first weight otherwise, which may be frozen in 16 bits before others that are trained in 32.
    """
    dtypes = {parameter.dtype for parameter in lvlm.parameters() if parameter.is_floating_point()}
    if len(dtypes) < 2:
        return
    file = directory / CONFIG_FILE
    config = json.loads(file.read_text(encoding="utf-8"))
    widest = max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    config["dtype"] = str(widest).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def unsaved_weights(lvlm: PreTrainedModel, directory: Path) -> list[str]:
    """Return the names of a model's trainable parameters that its written files do not hold."""
    trained = {name: parameter for name, parameter in lvlm.named_parameters() if parameter.requires_grad}
    if not trained:
        return []
    if has_adapter(lvlm):
        return _missing_from_adapter(lvlm, trained, directory)
    held = _names_in_files(lvlm, directory)
    return [name for name in trained if name not in held]


def _missing_from_adapter(lvlm: PreTrainedModel, trained: dict[str, nn.Parameter], directory: Path) -> list[str]:
    """Return the names of trained parameters that are not in an adapter's file."""
    from peft import get_peft_model_state_dict

    written: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            written |= set(tensors.keys())
    # PEFT renames what it saves, and the tensors tell which is which.
    named = get_peft_model_state_dict(lvlm, lvlm.state_dict(keep_vars=True), ADAPTER_NAME)
    held = {id(tensor) for name, tensor in named.items() if SAVED_PREFIX + name in written}
    return [name for name, parameter in trained.items() if id(parameter) not in held]


def _names_in_files(lvlm: PreTrainedModel, directory: Path) -> set[str]:
    """Return the names of the parameters that transformers would load from a model's files, in its own shape."""
    # Names in the files are not those in the model; transformers knows the way back. On the meta device it reads no
    # weights. Quantized weights, which nothing trains, would need the device that they were quantized for.
    config = copy.deepcopy(lvlm.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with _quiet_transformers():
        loaded, report = type(lvlm).from_pretrained(
            directory,
            config=config,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    return set(loaded.state_dict()) - set(report["missing_keys"]) - mismatched


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bar and its report of what a file lacks, which the caller gives."""
    was_shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_shown:
            logging.enable_progress_bar()
