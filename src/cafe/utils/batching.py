"""Batches of items of similar length."""

from collections.abc import Callable, Hashable, Iterator, Sequence
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
    make_encode: Callable[[], Callable[[Any], T]],
    batch_size: int,
    name: str,
    length: Callable[[Any], int] = len,
    group: Callable[[Any], Hashable] = id,
) -> Iterator[tuple[list[int], list[T]]]:
    """Yield encoded items in batches of similar length, longest first, with the indices of the items.

    They are sorted within a window of some batches, so that few wait encoded in memory.

    Args:
        items: what to batch.
        make_encode: makes the function that encodes the items of one window; what this keeps for items to share is
            dropped with it.
        batch_size: the number of items in a batch.
        name: what the items are called in errors, see `encode_item`.
        length: measures an encoded item.
        group: returns what encoded items have in common that should stay together, in one batch if they fit; by default
            each item is a group of its own.

    Raises:
        CafeError: the batch size is below 1.
        RecordError: an item is bad.
    """
    check_batch_size(batch_size)
    window = SORT_WINDOW * batch_size
    for start in range(0, len(items), window):
        # In a generator of its own, which keeps nothing of a window once it has ended.
        indices = range(start, min(start + window, len(items)))
        yield from _batches_of_window(items, indices, make_encode(), batch_size, name, length, group)


def _batches_of_window(
    items: Sequence[Any],
    indices: range,
    encode: Callable[[Any], T],
    batch_size: int,
    name: str,
    length: Callable[[Any], int],
    group: Callable[[Any], Hashable],
) -> Iterator[tuple[list[int], list[T]]]:
    """Yield the batches of one window, whose items have these indices; see `length_sorted_batches`."""
    encoded = {index: encode_item(items, index, encode, name) for index in indices}
    groups: dict[Hashable, list[int]] = {}
    for index in sorted(indices, key=lambda index: -length(encoded[index])):
        # The first item of a group is its longest, so groups are listed by their longest items.
        groups.setdefault(group(encoded[index]), []).append(index)
    # Each group goes into the first batch that has room for it; without groups, these are filled one after the other.
    batches: list[list[int]] = []
    for members in groups.values():
        for first in range(0, len(members), batch_size):
            part = members[first : first + batch_size]
            roomy = next((batch for batch in batches if len(batch) + len(part) <= batch_size), None)
            if roomy is None:
                batches.append(part)
            else:
                roomy += part
    for batch in batches:
        yield batch, [encoded[index] for index in batch]
