"""Load batches ahead in worker processes, and restart the workers if one dies."""

import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset

from cafe.data.batch import Batch
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.errors import CafeError
from cafe.utils.dataloader import make_loader

Item = TypeVar("Item")

# What a loader raises when a worker died; see `is_worker_crash`.
WORKER_ERRORS = (RuntimeError, EOFError, ConnectionError, FileNotFoundError)
MIN_BATCHES_BETWEEN_CRASHES = 10  # more than the workers are ahead of the run


def iterate_batches(
    dataset: ContrastiveBatchDataset,
    start: int,
    stop: int,
    num_workers: int,
    report: Callable[[str], None] = print,
) -> Iterator[Batch]:
    """Yield batches number `start` to `stop`, made ahead by worker processes. Workers that die are restarted.

    Args:
        dataset: makes the batches.
        start, stop: the first one, and the one after the last.
        num_workers: the number of processes; 0 makes batches in this one.
        report: prints a line.

    Raises:
        CafeError: they died again soon after.
    """
    number = start
    last_crash = start - MIN_BATCHES_BETWEEN_CRASHES  # the first crash is forgiven, wherever it is
    while number < stop:
        stream = start_workers(dataset, range(number, stop), num_workers)
        try:
            for batch in stream:
                yield batch
                number += 1  # after a restart, it is not made again
        except WORKER_ERRORS as error:
            if not is_worker_crash(error):
                raise
            if number - last_crash < MIN_BATCHES_BETWEEN_CRASHES:
                raise CafeError(
                    f"Data-loader workers died twice near batch {number}, often for lack of memory: "
                    "reduce data.num_workers or the size of images."
                ) from None
            last_crash = number
            report(f"A data-loader worker died near batch {number}; restarting workers from there.")


def start_workers(
    dataset: Dataset[Item],
    indices: Iterable[Any],
    num_workers: int,
    start_method: str = "fork",
    pin_memory: bool = True,
) -> Iterator[Item]:
    """Start worker processes that make the given items of a dataset, in order; see `make_loader`.

    With a GPU, their tensors are put into pinned memory, from which they are copied to it faster, unless `pin_memory`
    is false.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    stream = iter(
        make_loader(
            dataset,
            indices,
            num_workers,
            start_method=start_method,
            pin_memory=pin_memory and torch.cuda.is_available(),
            init_worker=_reset_signal_handlers,
            generator=torch.Generator(),  # otherwise the loader would draw from the run's own random numbers
        )
    )
    # PyTorch's handler raises wherever the main thread is when a worker dies: in the middle of a step.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return stream


def is_worker_crash(error: Exception) -> bool:
    """Return whether a loader's error means that a worker died, also while its last tensors were fetched."""
    if isinstance(error, RuntimeError):
        # The thread that pins memory fetches the tensors on a GPU, and ends if their worker did.
        return bool(
            re.search("(DataLoader worker|Pin memory thread).*(exited unexpectedly|killed by signal)", str(error))
        )
    # An error that a worker raised itself is sent with this text in it.
    return "in DataLoader worker" not in str(error)


def _reset_signal_handlers(worker: int) -> None:
    """Leave Ctrl-C, which reaches the whole process group, to the run, which ends its workers by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
