"""Collective operations between the processes of a run. With one process, all of them do nothing."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
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

BUCKET_NUMEL = 16 * 2**20  # gradient entries per all-reduce: 64 MiB in float32
INTEGER_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size

T = TypeVar("T")


def make_accelerator(**options: Any) -> Accelerator:
    """Join the processes that `accelerate launch` or `torchrun` started, or run alone."""
    # `torchrun` does not say that there is no GPU; each process would then take itself for the only one.
    return Accelerator(cpu=not torch.accelerator.is_available(), **options)


def world_size() -> int:
    """Return the number of processes."""
    if not dist.is_initialized():
        return 1
    return dist.get_world_size()


def rank() -> int:
    """Return the rank of this process."""
    if not dist.is_initialized():
        return 0
    return dist.get_rank()


def all_gather_object(value: T) -> list[T]:
    """Return the values of all processes, by rank."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def run_on_main_and_broadcast(function: Callable[[], T]) -> T:
    """Call a function in the main process and return its result in all processes.

    Raises:
        CafeError: the function raised it; then all processes do, instead of waiting for a result.
    """
    message: list[Any] = [None, None]  # the result and the error
    if rank() == 0:
        try:
            message[0] = function()
        except CafeError as error:
            message[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(message)
    result, failure = message
    if failure is not None:
        raise failure
    return result


def all_reduce_max(number: int, device: torch.device) -> int:
    """Return the largest of the processes' numbers, as an integer."""
    if world_size() == 1:
        return int(number)  # a tensor would wait for all that is queued on the GPU
    largest = torch.tensor(int(number), device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def all_reduce_min(number: int, device: torch.device) -> int:
    """Return the smallest of the processes' numbers, as an integer."""
    return -all_reduce_max(-number, device)


def all_reduce_sum_(tensor: Shaped[Tensor, " *shape"]) -> Shaped[Tensor, " *shape"]:
    """Sum the processes' tensors in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_int(number: int, device: torch.device) -> Int64[Tensor, " processes"]:
    """Return the numbers of all processes, by rank."""
    # A sum of vectors that have one entry each, on the device: no object is pickled, and nothing waits for the GPU.
    numbers = torch.zeros(world_size(), dtype=torch.long, device=device)
    numbers[rank()] = number
    return all_reduce_sum_(numbers)


def exclusive_prefix_sum(number: int, device: torch.device) -> Int64[Tensor, ""]:
    """Return the sum of the numbers of all lower ranks."""
    return all_gather_int(number, device)[: rank()].sum()


def all_gather_rows(*tensors: Shaped[Tensor, "own ..."]) -> tuple[Shaped[Tensor, "all ..."], ...]:
    """Concatenate all processes' rows of several tensors. The tensors have equally many rows; processes may differ.

    Only this process's own rows carry gradient. They are all that its parameters contribute to a loss which every
    process computes from all rows alike: the sum of the processes' gradients is the gradient of that one loss.
    """
    if world_size() == 1:
        return tensors
    lengths = all_gather_int(len(tensors[0]), tensors[0].device).tolist()
    return tuple(_gather_rows(rows, lengths) for rows in tensors)


def _gather_rows(rows: Tensor, lengths: list[int]) -> Tensor:
    """Gather the rows of one tensor from processes that have `lengths` of them."""
    # all_gather wants equal shapes: pad to the most rows, and cut the padding off again.
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    parts = [part[:length] for part, length in zip(parts, lengths, strict=True)]
    # all_gather is outside of autograd: put this process's own rows back, which are attached to its graph.
    parts[rank()] = rows
    return torch.cat(parts)


def mismatched_tensors(tensors: Mapping[str, Tensor], device: torch.device) -> list[str]:
    """Return the names of tensors whose bits differ between processes, the same list in all of them."""
    if world_size() == 1 or not tensors:
        return []
    # One number per tensor is compared instead of its elements, which would be a model's worth of traffic.
    sums = torch.stack([_sum_of_bits(tensor) for tensor in tensors.values()]).to(device)
    [all_sums] = all_gather_rows(sums[None])
    mismatched = (all_sums != all_sums[0]).any(0).tolist()
    return list(compress(tensors, mismatched))


def _sum_of_bits(tensor: Tensor) -> Int64[Tensor, ""]:
    """Sum a tensor's elements with their bits read as integers: such a sum is exact in any order of summation."""
    bits = tensor.detach().reshape(-1).view(INTEGER_DTYPES[tensor.element_size()])
    return bits.sum(dtype=torch.long)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that a GPU or the CPU is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


@contextmanager
def raise_oom_on_all_ranks(device: torch.device) -> Iterator[None]:
    """Raise an out-of-memory error in all processes if one has it, so that none waits for another that gave up.

    The processes must not wait for each other within the context.
    """
    failed = False
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    # Outside of the handler, where the error still holds the tensors of the failed work.
    if not all_reduce_max(failed, device):
        return
    if failed:
        raise torch.OutOfMemoryError("Out of memory")
    raise torch.OutOfMemoryError("Another process is out of memory")


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of all processes in place; a parameter that no process used keeps none.

    Sharded parameters are left as they are: FSDP sums their gradients in the backward pass.
    """
    if world_size() == 1:
        return
    _, replicated = _split_by_sharding(parameters)
    if not replicated:
        return
    # The same parameters in all processes: each takes part in every sum, whether it has a gradient or not.
    for grads in _gradient_buckets(_used_in_any_process(replicated)):
        _all_reduce_bucket(grads)


def _used_in_any_process(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters that have a gradient in at least one process."""
    has_grad = torch.tensor([parameter.grad is not None for parameter in parameters], device=parameters[0].device)
    num_users = all_reduce_sum_(has_grad.int())
    return list(compress(parameters, num_users.tolist()))


def _all_reduce_bucket(grads: list[Tensor]) -> None:
    """Sum several gradients in place by one operation, since many small ones would wait for the network each."""
    flat = torch.cat([grad.flatten() for grad in grads])
    all_reduce_sum_(flat)
    summed_grads = flat.split([grad.numel() for grad in grads])
    for grad, summed in zip(grads, summed_grads, strict=True):
        grad.copy_(summed.view_as(grad))


def _gradient_buckets(parameters: Iterable[nn.Parameter]) -> list[list[Tensor]]:
    """Group gradients of one dtype into buckets of at most `BUCKET_NUMEL` entries, zeros for missing ones."""
    buckets: list[list[Tensor]] = []
    room = 0  # entries left in the last bucket
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        # No room at the start, so there is a bucket before its dtype is looked up.
        if parameter.numel() > room or parameter.dtype != buckets[-1][-1].dtype:
            buckets.append([])
            room = max(BUCKET_NUMEL, parameter.numel())  # a larger gradient has a bucket of its own
        buckets[-1].append(parameter.grad)
        room -= parameter.numel()
    return buckets


def global_grad_norm(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> Float[Tensor, ""]:
    """Return the norm of all gradients together, each summed over processes; the gradients are left as they are."""
    pairs = list(zip(parameters, grads, strict=True))
    # FSDP has summed the gradients of sharded parameters already.
    sharded = [grad for parameter, grad in pairs if isinstance(parameter, DTensor) and grad is not None]
    square = _total_norm(sharded).square()
    # One copy at a time, so that the sums take no second gradient's worth of memory.
    for parameter, grad in pairs:
        if isinstance(parameter, DTensor):
            continue
        # Every process takes part in every sum, whether it has a gradient or not.
        own = torch.zeros_like(parameter) if grad is None else grad.clone()
        summed = all_reduce_sum_(own)
        square = square.to(summed.device) + summed.float().square().sum()
    return square.sqrt()


def clip_grad_norm_(parameters: Sequence[nn.Parameter], max_norm: float) -> Float[Tensor, ""]:
    """Scale summed gradients in place so that their total norm is at most `max_norm`; return the norm before."""
    # Sharded and replicated gradients cannot be stacked: each kind has a norm of its own first.
    sharded, replicated = _split_by_sharding(parameters)
    grads_by_kind = existing_grads(sharded), existing_grads(replicated)
    norms = [_total_norm(grads) for grads in grads_by_kind if grads]
    if not norms:
        return torch.zeros(())
    norm = torch.stack(norms).norm()
    clip_grads_with_norm_(sharded, max_norm, norm)
    clip_grads_with_norm_(replicated, max_norm, norm)
    return norm


def _split_by_sharding(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the sharded parameters, and those that each process has as a whole."""
    sharded: list[nn.Parameter] = []
    replicated: list[nn.Parameter] = []
    for parameter in parameters:
        kind = sharded if isinstance(parameter, DTensor) else replicated
        kind.append(parameter)
    return sharded, replicated


def existing_grads(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the gradients of the parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the norm of gradients together that are all sharded or all replicated."""
    norm = get_total_norm(grads)
    if isinstance(norm, DTensor):
        return norm.full_tensor()
    return norm
