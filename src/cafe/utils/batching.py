"""Batches of items of similar length."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from cafe.errors import CafeError

T = TypeVar("T")
SORT_WINDOW = 8  # batches within which items are sorted by length


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch size below 1.

    Raises:
        CafeError: it is.
    """
    if batch_size < 1:
        raise CafeError(f"batch_size should be above 0, not {batch_size}.")


def length_sorted_batches(
    items: Sequence[Any], encode: Callable[[Any], T], batch_size: int, length: Callable[[Any], int] = len
) -> Iterator[tuple[list[int], list[T]]]:
    """Yield encoded items in batches of similar length, longest first, with the indices of the items.

    They are sorted within a window of some batches, so that few wait encoded in memory.
    """
    check_batch_size(batch_size)
    window = SORT_WINDOW * batch_size
    for start in range(0, len(items), window):
        encoded = [encode(item) for item in items[start : start + window]]
        order = sorted(range(len(encoded)), key=lambda index: -length(encoded[index]))
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            yield [start + index for index in batch], [encoded[index] for index in batch]
