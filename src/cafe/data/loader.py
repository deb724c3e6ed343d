"""Load batches in worker processes, and replace workers that die."""

import re
import signal
import threading
from collections.abc import Callable, Iterator

import torch

from cafe.data.batch import Batch
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.errors import CafeError
from cafe.utils.dataloader import make_loader

MIN_BATCHES_BETWEEN_CRASHES = 10  # batches; workers are ahead of the run by less


def iterate_batches(
    batches: ContrastiveBatchDataset, start: int, stop: int, workers: int, report: Callable[[str], None] = print
) -> Iterator[Batch]:
    """Batches number `start` to `stop`, made ahead in worker processes. Workers that die are replaced.

    Raises:
        CafeError: they died again soon after.
    """
    number, died = start, -MIN_BATCHES_BETWEEN_CRASHES
    while number < stop:
        handler = signal.getsignal(signal.SIGCHLD)
        stream = iter(
            make_loader(
                batches,
                range(number, stop),
                workers,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_leave_signals_to_the_run,
                generator=torch.Generator(),  # else making the loader would draw from the run's own
            )
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)  # the loader's would raise in the middle of a step
        try:
            for batch in stream:
                yield batch
                number += 1
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            if not _is_worker_crash(error):
                raise
            if number - died < MIN_BATCHES_BETWEEN_CRASHES:
                raise CafeError(
                    f"The loader workers died twice around batch {number}: often memory is short for them, and fewer "
                    "of them (data.num_workers) or smaller pictures need less."
                ) from None
            died = number
            report(f"A loader worker died around batch {number}; new ones go on from there.")


def _is_worker_crash(error: Exception) -> bool:
    """Whether a loader's error says that a worker died: outright, or as its last tensors are fetched from it."""
    if isinstance(error, RuntimeError):
        return bool(re.search("DataLoader worker .*(exited unexpectedly|killed by signal)", str(error)))
    return "in DataLoader worker" not in str(error)


def _leave_signals_to_the_run(worker: int) -> None:
    """^C reaches a whole process group: the run takes it, its workers go on until it ends them by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
