"""Loading data ahead of its use, in worker processes."""

import os
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")

SECONDS_BETWEEN_CHECKS = 1.0  # of whether the parent of a worker is still there


def make_loader(
    dataset: Dataset[Item],
    indices: Iterable[Any],
    num_workers: int,
    init_worker: Callable[[int], None] | None = None,
    start_method: str = "fork",
    **options: Any,
) -> DataLoader[Item]:
    """Load items of a dataset by index, in order, ahead of their use.

    Args:
        dataset: the items.
        indices: which to load.
        num_workers: worker processes, which end when this process does, however that ends; 0 loads in this process.
        init_worker: called in each worker with its number.
        start_method: how workers start, by multiprocessing's name. "fork", whatever Python's default is, because other
            ways pickle the dataset, and some processors cannot be; "spawn" where this process has threads of a library
            that do not survive a fork.
        options: passed to `DataLoader`.
    """
    context = start_method if num_workers else None
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        multiprocessing_context=context,
        worker_init_fn=partial(_start_worker, os.getpid(), init_worker),
        **options,
    )


def _start_worker(parent: int, init_worker: Callable[[int], None] | None, number: int) -> None:
    """Set up a worker: it ends with its parent, also while it waits for a file that never comes."""
    # PyTorch's workers look after their parent only between two items.
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    if init_worker:
        init_worker(number)


def _exit_with(parent: int) -> None:
    """Wait until the parent process is gone, and end this one."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_CHECKS)
    os._exit(1)
