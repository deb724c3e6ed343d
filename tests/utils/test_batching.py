"""Batches of items of similar length."""

import weakref
from random import Random

import pytest

from cafe.errors import RecordError
from cafe.utils.batching import SORT_WINDOW, length_sorted_batches


def test_items_are_batched_longest_first_and_those_of_a_group_stay_together():
    items = ["a1", "bbbbb", "a22222222", "cccc", "dd", "a333"]
    batches = length_sorted_batches(
        items, lambda: str.upper, 3, "items", group=lambda item: "A" if item[0] == "A" else item
    )
    assert [[items[index] for index in indices] for indices, _ in batches] == [
        ["a22222222", "a333", "a1"],
        ["bbbbb", "cccc", "dd"],
    ]
    # The group does not fit behind the longest item, and is not cut for that.
    items[1] = "b" * 10
    batches = length_sorted_batches(
        items, lambda: str.upper, 3, "items", group=lambda item: "A" if item[0] == "A" else item
    )
    assert [[items[index] for index in indices] for indices, _ in batches] == [
        ["bbbbbbbbbb", "cccc", "dd"],
        ["a22222222", "a333", "a1"],
    ]


def test_every_item_comes_once_with_its_index():
    rng = Random(0)
    items = ["x" * rng.randint(1, 9) for _ in range(100)]
    found = {}
    for indices, batch in length_sorted_batches(items, lambda: str.upper, 3, "items", group=len):
        assert len(batch) <= 3
        found |= dict(zip(indices, batch, strict=True))
    assert found == {index: item.upper() for index, item in enumerate(items)}


def test_nothing_of_a_window_is_kept_when_the_next_is_encoded():
    class Encoded(list):
        pass

    made, alive_at_start = weakref.WeakSet(), []

    def make_encode():
        alive_at_start.append(len(made))
        shared = Encoded()

        def encode(item):
            encoded = Encoded([item, shared])
            made.update((encoded, shared))
            return encoded

        # Hashed by identity, as a weak set needs it.
        return encode

    Encoded.__hash__ = object.__hash__
    for _ in length_sorted_batches(range(3 * SORT_WINDOW), make_encode, 1, "items"):
        pass
    assert len(alive_at_start) == 3 and max(alive_at_start) <= 2  # the last batch of the loop here, and what it shares


def test_an_error_names_the_item():
    def encode(item):
        raise RecordError("is bad.")

    with pytest.raises(RecordError, match=r"^items\[0\]: is bad\."):
        list(length_sorted_batches(["a"], lambda: encode, 2, "items"))
