"""What the processes of one run share: their number, sums, and rows with gradient. One process needs none of it."""

import torch
import torch.distributed.nn.functional as dist_nn
from torch import Tensor


def world() -> int:
    """The number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def everyone(count: Tensor) -> Tensor:
    """The sum of a number over all processes."""
    if world() > 1:
        torch.distributed.all_reduce(count)
    return count


def gather(rows: Tensor) -> Tensor:
    """All processes' rows, with gradient.

    The backward pass sums the gradients of all processes' losses, which are equal: so after gradients are averaged over
    processes they are those of the one global loss.
    """
    if world() == 1:
        return rows
    return torch.cat(tuple(dist_nn.all_gather(rows.contiguous())), dim=0)
