"""Hash the weights of a model."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Digest(Protocol):
    """Stand for the hash objects of `hashlib`."""

    def update(self, data: Any, /) -> None:
        """Add bytes to the hash."""


def update_with_tensors(digest: Digest, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Add named tensors to a hash: each name, then the tensor's bytes, whatever its dtype."""
    for name, tensor in named_tensors:
        digest.update(name.encode())
        # As bytes, since NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
