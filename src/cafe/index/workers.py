"""Run a reader in worker processes, and find the item that ended one.

Workers are spawned and not forked, because neither LanceDB nor pdfium survives a fork.
"""

import io
import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cafe.data.loader import WORKER_ERRORS, is_worker_crash, start_workers
from cafe.index.reading import Item, Reader, Reading

BATCHES_AHEAD = 2  # of each worker, as PyTorch's loader has it


def read_ahead(
    reader: Reader, items: Sequence[Item], batch_size: int, num_workers: int
) -> Iterator[tuple[int, list[Reading]]]:
    """Yield the readings of items, in order and some at a time, with the number of items they belong to.

    An image that ends its worker, as a decoder written in C may, is found by reading those that were under way one at
    a time, and is a bad one if it ends another worker by itself.

    Args:
        reader: reads them.
        items: what to read.
        batch_size: the number of images that are read together.
        num_workers: the number of processes; 0 reads in this one.
    """
    batches = _split(items, batch_size)
    number = 0
    while number < len(batches):
        try:
            for readings in _start(reader, batches[number:], num_workers):
                yield len(batches[number]), readings
                number += 1
        except WORKER_ERRORS as error:
            if not is_worker_crash(error):
                raise
            under_way = batches[number : number + BATCHES_AHEAD * num_workers]
            yield from _read_one_by_one(reader, [item for batch in under_way for item in batch])
            number += len(under_way)


def _split(items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """Split items into batches of at most so many images, or one item that has more."""
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


def _start(reader: Reader, batches: Sequence[Sequence[Item]], num_workers: int) -> Iterator[list[Reading]]:
    """Start workers that read batches of items."""
    if not num_workers:
        yield from start_workers(reader, batches, 0)
        return
    with without_main_module():
        pickled = start_workers(_PicklingReader(reader), batches, num_workers, start_method="spawn")
    for data in pickled:
        yield pickle.loads(data.numpy().data)


@dataclass
class _PicklingReader(Dataset[Tensor]):
    """Read lists of items, and return the readings as the bytes of one tensor.

    PyTorch sends each tensor by a file descriptor of its own, and those of many images would take the receiving process
    about as long as a small model takes for the images. A tensor all the same, because of it only the descriptor goes
    through the pipe: of bytes, a worker that dies could leave a part there, and the rest would be waited for forever.
    """

    reader: Reader

    def __getitem__(self, items: Sequence[Item]) -> Tensor:
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(self.reader[items])
        return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


class _Pickler(pickle.Pickler):
    """Pickle tensors as NumPy arrays, which is many times faster than PyTorch's own way."""

    def reducer_override(self, value: Any) -> Any:
        """Return how to rebuild a tensor; all else is pickled as usual."""
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


@contextmanager
def without_main_module() -> Iterator[None]:
    """Start processes that do not run the user's script once more, as spawned ones otherwise do.

    Nothing that they need is in it, and a script without `if __name__ == "__main__"` would start workers without end.
    """
    main = sys.modules["__main__"]
    spec, file = main.__spec__, main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file
