"""Run a reader in worker processes, and find the item that ended one.

Workers are spawned and not forked, because neither LanceDB nor pdfium survives a fork.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cafe.data.loader import WORKER_ERRORS, is_worker_crash, start_workers
from cafe.index.reading import Item, Reader, Reading
from cafe.utils.processes import dump, restore, without_main_module


def read_ahead(
    reader: Reader, items: Sequence[Item], batch_size: int, num_workers: int
) -> Iterator[tuple[int, list[Reading]]]:
    """Yield the readings of items, some at a time, with the number of items they belong to.

    Workers take seconds to start; meanwhile this process reads images itself. An image that ends its worker, as a
    decoder written in C may, is found by reading those that were under way one at a time, and is a bad one if it ends
    another worker by itself.

    Args:
        reader: reads them.
        items: what to read.
        batch_size: the number of images that are read together.
        num_workers: the number of processes; 0 reads in this one.
    """
    waiting = deque(_split(items, batch_size))
    if not num_workers:
        yield from ((len(batch), reader[batch]) for batch in waiting)
        return
    while waiting:
        taken: list[list[Item]] = []
        num_read = 0
        try:
            stream = _start(reader, _take(waiting, taken), num_workers)
            with ThreadPoolExecutor(1) as thread:
                first = thread.submit(next, stream)
                while not first.done() and (batch := _pop_images(waiting)):
                    yield len(batch), reader[batch]
            for readings in chain([first.result()], stream):
                num_read += 1
                yield len(taken[num_read - 1]), readings
        except WORKER_ERRORS as error:
            if not is_worker_crash(error):
                raise
            under_way = taken[num_read:]
            yield from _read_one_by_one(reader, [item for batch in under_way for item in batch])


def _take(waiting: deque[list[Item]], taken: list[list[Item]]) -> Iterator[list[Item]]:
    """Yield batches as workers become free, and note in `taken` which they have."""
    with suppress(IndexError):  # none is left
        while True:
            taken.append(waiting.popleft())
            yield taken[-1]


def _pop_images(waiting: deque[list[Item]]) -> list[Item] | None:
    """Take the next batch if no PDF file is in it: pdfium may end the process that calls it."""
    try:
        batch = waiting.popleft()
    except IndexError:  # the thread that waits for the workers may have given them the last one just now
        return None
    if any(item.is_pdf for item in batch):
        waiting.appendleft(batch)
        return None
    return batch


def _split(items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """Split items into batches of at most so many images, or one item that has more."""
    # A PDF item counts for as many images as it may have pages.
    batches: list[list[Item]] = []
    room = 0
    for item in items:
        if item.num_images > room:
            batches.append([])
            room = batch_size
        batches[-1].append(item)
        room -= item.num_images
    return batches


def _read_one_by_one(reader: Reader, items: Sequence[Item]) -> Iterator[tuple[int, list[Reading]]]:
    """Yield the readings of each item; those that end their worker are bad."""
    number = 0
    while number < len(items):
        try:
            for readings in _start(reader, [[item] for item in items[number:]], 1):
                yield 1, readings
                number += 1
        except WORKER_ERRORS as error:
            if not is_worker_crash(error):
                raise
            # A worker that dies may take the item before the bad one along, which is still on its way.
            yield 1, _read_alone(reader, items[number])
            number += 1


def _read_alone(reader: Reader, item: Item) -> list[Reading]:
    """Return the readings of an item that has a worker for itself."""
    try:
        [readings] = _start(reader, [[item]], 1)
        return readings
    except WORKER_ERRORS as error:
        if not is_worker_crash(error):
            raise
        place = reader.place_of(item)
        return [Reading(replace(place, error=f"Reading {place.id} ended the process that did it."))]


def _start(reader: Reader, batches: Iterable[Sequence[Item]], num_workers: int) -> Iterator[list[Reading]]:
    """Start workers that read batches of items, in order."""
    with without_main_module():
        # Not pinned: what goes to the GPU is unpickled from these bytes.
        pickled = start_workers(_PicklingReader(reader), batches, num_workers, start_method="spawn", pin_memory=False)
    return (restore(data.numpy().data) for data in pickled)


@dataclass
class _PicklingReader(Dataset[Tensor]):
    """Read lists of items, and return the readings as the bytes of one tensor.

    PyTorch sends each tensor by a file descriptor of its own, and those of many images would take the receiving process
    about as long as a small model takes for the images. A tensor all the same, because of it only the descriptor goes
    through the pipe: of bytes, a worker that dies could leave a part there, and the rest would be waited for forever.
    """

    reader: Reader

    def __getitem__(self, items: Sequence[Item]) -> Tensor:
        return torch.frombuffer(dump(self.reader[items]), dtype=torch.uint8)
