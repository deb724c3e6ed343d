"""Batches of items of similar length."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from cafe.errors import CafeError, RecordError

T = TypeVar("T")
SORT_WINDOW = 8  # batches within which items are sorted by length


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch size below 1.

    Raises:
        CafeError: it is.
    """
    if batch_size < 1:
        raise CafeError(f"batch_size should be above 0, not {batch_size}.")


def encode_item(items: Sequence[Any], index: int, encode: Callable[[Any], T], name: str) -> T:
    """Encode one of several items; an error names it, as in "images[3]".

    Args:
        items: all of them.
        index: of the one to encode.
        encode: encodes an item.
        name: what the items are called.

    Raises:
        RecordError: the item is bad.
    """
    try:
        return encode(items[index])
    except RecordError as error:
        raise RecordError(f"{name}[{index}]: {error}") from error


def length_sorted_batches(
    items: Sequence[Any],
    encode: Callable[[Any], T],
    batch_size: int,
    name: str,
    length: Callable[[Any], int] = len,
) -> Iterator[tuple[list[int], list[T]]]:
    """Yield encoded items in batches of similar length, longest first, with the indices of the items.

    They are sorted within a window of some batches, so that few wait encoded in memory.

    Args:
        items: what to batch.
        encode: encodes an item.
        batch_size: the number of items in a batch.
        name: what the items are called in errors, see `encode_item`.
        length: measures an encoded item.

    Raises:
        CafeError: the batch size is below 1.
        RecordError: an item is bad.
    """
    check_batch_size(batch_size)
    window = SORT_WINDOW * batch_size
    for start in range(0, len(items), window):
        stop = min(start + window, len(items))
        encoded = [(index, encode_item(items, index, encode, name)) for index in range(start, stop)]
        encoded.sort(key=lambda pair: -length(pair[1]))
        for first in range(0, len(encoded), batch_size):
            indices, batch = zip(*encoded[first : first + batch_size], strict=True)
            yield list(indices), list(batch)
