"""Files of a vision tower's output: tensors alone, from which nothing can be run, and checked when they are read."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_outputs
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn
from transformers.utils import ModelOutput

# What reading a damaged file raises.
DAMAGE = (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
MAX_LAYERS = 1000  # of a tower whose hidden states are kept

# How a field of an output is stored: null, "tensor", or the type and length of a sequence of tensors and nulls.
FieldForm = str | list[Any] | None


def save_output(output: ModelOutput, file: Path) -> None:
    """Write an output whose fields are tensors, or tuples or lists of tensors, of which any may be missing."""
    tensors: dict[str, Tensor] = {}
    forms: dict[str, FieldForm] = {}
    for name, value in output.items():
        if isinstance(value, (tuple, list)):
            forms[name] = [type(value).__name__, len(value)]
            tensors |= {f"{name}.{index}": item for index, item in enumerate(value) if item is not None}
        else:
            forms[name] = None if value is None else "tensor"
            tensors |= {} if value is None else {name: value}
    # Views are cloned, or their whole storage would be saved.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(tensors, file, {"class": type(output).__name__, "fields": json.dumps(forms)})


def load_output(file: Path, tower: nn.Module, device: torch.device, num_rows: int, dim: int) -> ModelOutput:
    """Read an output.

    Args:
        file: the file.
        tower: the tower that made it.
        device: where the tensors go.
        num_rows: the rows that each tensor has along `dim`, or that number divided by a factor.
        dim: the dimension of the rows.

    Raises:
        one of `DAMAGE`: it is damaged.
    """
    # Read as a whole: a file that is mapped into memory and then cut would end the process.
    data = file.read_bytes()
    tensors = {name: tensor.to(device) for name, tensor in load(data).items()}
    header_size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + header_size])["__metadata__"]
    forms: dict[str, FieldForm] = json.loads(metadata["fields"])
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel() or num_rows % tensor.shape[dim]:
            raise ValueError(f"{name} is of {tensor.dtype} and shape {tuple(tensor.shape)}")
    fields = {name: _field(name, form, tensors) for name, form in forms.items()}

    # A field without a value is set afterwards: it keeps its place among the others, as where the output was made.
    placeholder = next(iter(tensors.values()))
    given = {name: placeholder if value is None else value for name, value in fields.items()}
    output = _output_class(metadata["class"], tower)(**given)
    for name, value in fields.items():
        if value is None:
            output[name] = None
    return output


def _field(name: str, form: FieldForm, tensors: dict[str, Tensor]) -> Any:
    """Return the value of a field by its form."""
    if form is None:
        return None
    if isinstance(form, str):
        return tensors[name]
    kind, length = form
    if length > MAX_LAYERS:
        raise ValueError(f"{name} has {length} parts")
    items = [tensors.get(f"{name}.{index}") for index in range(length)]
    return tuple(items) if kind == "tuple" else items


def _output_class(name: str, tower: nn.Module) -> type[ModelOutput]:
    """Return a class of outputs by its name: one that the tower's own module knows, so that nothing is imported."""
    for module in (sys.modules[type(tower).__module__], transformers.modeling_outputs):
        found = getattr(module, name, None)
        if isinstance(found, type) and issubclass(found, ModelOutput):
            return found
    raise ValueError(f"{type(tower).__name__} has no output {name}")
