"""What the processes of one run share: their number, sums, and rows. One process needs none of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from cafe.errors import CafeError

BUCKET_NUMEL = 16 * 2**20  # entries of gradients that are summed at once: 64 MiB in float32


def make_accelerator(**options: Any) -> Accelerator:
    """The processes that `accelerate launch` or `torchrun` started, or this one alone.

    `torchrun` does not say that there is no GPU, and each process would then take itself for the only one.
    """
    return Accelerator(cpu=not torch.accelerator.is_available(), **options)


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


T = TypeVar("T")


def all_gather_object(value: T) -> list[T]:
    """The processes' values, in order."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def run_on_main_and_broadcast(make: Callable[[], T]) -> T:
    """What the first process makes, for all; a mistake that it finds is raised in all."""
    made: list[Any] = [None, None]
    if rank() == 0:
        try:
            made[0] = make()
        except CafeError as error:
            made[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(made)
    if made[1] is not None:
        raise CafeError(made[1])
    return made[0]


def all_reduce_max(number: int, device: torch.device) -> int:
    """The largest of the processes' numbers."""
    if world_size() == 1:
        return int(number)  # which would wait, on its way to a GPU and back, for all that is queued there
    largest = torch.tensor(int(number), device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def all_reduce_sum_(own: Shaped[Tensor, " *shape"]) -> Shaped[Tensor, " *shape"]:
    """The sum of the processes' tensors, in place."""
    if world_size() > 1:
        dist.all_reduce(own)
    return own


def mismatched_tensors(tensors: Mapping[str, Tensor], device: torch.device) -> list[str]:
    """The names of those tensors that are not the same bits in every process; the same names in all of them."""
    if world_size() == 1 or not tensors:
        return []
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = (tensor.detach().reshape(-1).view(integers[tensor.element_size()]) for tensor in tensors.values())
    sums = torch.stack([each.sum(dtype=torch.long) for each in bits]).to(device)  # exact, in whatever order
    [every] = all_gather_rows(sums[None])
    same = (every == every[0]).all(0).tolist()
    return [name for name, alike in zip(tensors, same, strict=True) if not alike]


def all_gather_int(own: int, device: torch.device) -> Int64[Tensor, " processes"]:
    """The processes' numbers, in order."""
    every = torch.zeros(world_size(), dtype=torch.long, device=device)
    every[rank()] = own
    return all_reduce_sum_(every)


def exclusive_prefix_sum(own: int, device: torch.device) -> Int64[Tensor, ""]:
    """The sum of the numbers of the processes that come before this one."""
    return all_gather_int(own, device)[: rank()].sum()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


@contextmanager
def raise_oom_on_all_ranks(device: torch.device) -> Iterator[None]:
    """Makes an out-of-memory error of one process one of all, so that none waits for another that gave up.

    For work in which processes do not wait for each other.
    """
    failed = False
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    if all_reduce_max(failed, device):
        raise torch.OutOfMemoryError("Out of memory" if failed else "Another process is out of memory")


def all_gather_rows(*tensors: Shaped[Tensor, "own ..."]) -> tuple[Shaped[Tensor, "all ..."], ...]:
    """All processes' rows of some tensors with as many rows each; those of different processes need not be as many.

    Only this process's own rows carry gradient. That is all that its parameters contribute to a loss which every
    process computes from all rows alike: the sum of the processes' gradients is the gradient of that one loss.
    """
    if world_size() == 1:
        return tensors
    own = len(tensors[0])
    lengths = all_gather_int(own, tensors[0].device).tolist()

    def every(rows: Tensor) -> Tensor:
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[:own] = rows.detach()
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        parts = [part[:length] for part, length in zip(parts, lengths, strict=True)]
        parts[rank()] = rows
        return torch.cat(parts)

    return tuple(map(every, tensors))


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Makes every process's gradients their sum over all; a parameter that none used has none, as in one process.

    Those of sharded parameters were summed when they were made.
    """
    whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if world_size() == 1 or not whole:
        return
    used = all_reduce_sum_(
        torch.tensor([parameter.grad is not None for parameter in whole], device=whole[0].device).int()
    )
    buckets: list[list[Tensor]] = []
    room = 0
    for parameter, uses in zip(whole, used.tolist(), strict=True):
        if not uses:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.numel() > room or parameter.dtype != buckets[-1][-1].dtype:
            buckets.append([])
            room = max(BUCKET_NUMEL, parameter.numel())
        buckets[-1].append(parameter.grad)
        room -= parameter.numel()
    for grads in buckets:
        flat = all_reduce_sum_(torch.cat([grad.flatten() for grad in grads]))
        for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


def global_grad_norm(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> Float[Tensor, ""]:
    """The norm of some parameters' gradients together, each summed over processes first, which leaves it as it is."""
    sharded = [grad for parameter, grad in zip(parameters, grads, strict=True) if isinstance(parameter, DTensor)]
    square = _norm([grad for grad in sharded if grad is not None]).square()
    for parameter, grad in zip(parameters, grads, strict=True):
        if not isinstance(parameter, DTensor):
            own = torch.zeros_like(parameter) if grad is None else grad.clone()
            square = square.to(own.device) + all_reduce_sum_(own).float().square().sum()
    return square.sqrt()


def clip_grad_norm_(parameters: Sequence[nn.Parameter], largest: float) -> Float[Tensor, ""]:
    """Scales summed gradients so that their norm together is at most `largest`; returns what it was."""
    with_grad = [parameter for parameter in parameters if parameter.grad is not None]
    kinds = [[p for p in with_grad if isinstance(p, DTensor) is sharded] for sharded in (True, False)]
    norms = [_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
    norm = torch.stack(norms).norm() if norms else torch.zeros(())
    for kind in kinds:
        clip_grads_with_norm_(kind, largest, norm)
    return norm


def _norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm of gradients that are all sharded or all whole."""
    norm = get_total_norm(grads)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
