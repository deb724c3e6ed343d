"""Find tensors that hold NaN or infinite values."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def find_nonfinite(named_tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with a value that is not finite, or None.

    Of a sharded tensor, this process's shard is looked at.
    """
    for name, tensor in named_tensors:
        if not is_finite(tensor):
            return name
    return None


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all values of a tensor are finite."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    # Types of one byte hold quantized values, and a tensor on the meta device holds none.
    has_values = tensor.numel() > 0 and not tensor.is_meta
    if not has_values or not tensor.is_floating_point() or tensor.element_size() == 1:
        return True
    # NaN is both the smallest and the largest value of a tensor that has one; `isfinite` is many times slower.
    smallest, largest = torch.aminmax(tensor.detach())
    return math.isfinite(smallest.item()) and math.isfinite(largest.item())
