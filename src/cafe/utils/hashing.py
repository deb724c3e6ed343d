"""The bytes of a model's weights, for hashes."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def iter_tensor_bytes(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[bytes | memoryview]:
    """Yield what a hash of named tensors is made of: each name, then the tensor's bytes, whatever its dtype."""
    for name, tensor in named_tensors:
        yield name.encode()
        # NumPy has no bfloat16, so the tensor is seen as bytes before it becomes an array.
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
