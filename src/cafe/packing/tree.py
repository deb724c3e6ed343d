"""The prefix trees that branches form: what they have in common, and where they part."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from cafe.packing.branch import Branch

SharingKeys = NDArray[np.int64]


def _sharing_keys(branches: Sequence[Branch]) -> list[SharingKeys]:
    """Each branch as numbers that are equal exactly where its tokens can be shared.

    Pictures that were processed together are shared all or none: the key of their tokens stands for the whole set and
    for the words between them.
    """
    known: dict[tuple[int, bytes], int] = {}
    keys = []
    for branch in branches:
        ids = branch.input_ids.numpy().copy()
        if branch.image_mask.any():
            shown = branch.image_mask.numpy()
            number = known.setdefault(
                (id(branch.image_inputs), ids[: np.flatnonzero(shown)[-1] + 1].tobytes()), len(known)
            )
            ids[shown] = -1 - number
        keys.append(ids)
    return keys


def _common_prefix_length(keys: Sequence[SharingKeys], start: int = 0) -> int:
    """How many first numbers all have in common; the first `start` are known to be."""
    first, length = keys[0], min(map(len, keys))
    for other in keys[1:]:
        parted = np.flatnonzero(first[start:length] != other[start:length])
        length = start + int(parted[0]) if len(parted) else length
    return length


def _iter_tree(
    members: Sequence[int], keys: Sequence[SharingKeys], start: int = 0
) -> Iterator[tuple[int, int, list[int], int]]:
    """The tree of some branches, depth first: (start, stop, members, size) of each node.

    A node is the stretch of tokens from `start` to `stop` that its members share; `size` counts the tokens of the node
    and all below it.
    """
    stop = _common_prefix_length([keys[member] for member in members], start)
    beyond = sorted((member for member in members if len(keys[member]) > stop), key=lambda member: keys[member][stop])
    below = [
        node
        for _, part in groupby(beyond, lambda member: keys[member][stop])
        for node in _iter_tree(list(part), keys, stop)
    ]
    yield start, stop, list(members), stop - start + sum(node[1] - node[0] for node in below)
    yield from below


def count_unique_tokens(branches: Sequence[Branch]) -> int:
    """The tokens of some branches with what they share counted once."""
    return _num_tokens(range(len(branches)), _sharing_keys(branches))


def _num_tokens(members: Sequence[int], keys: Sequence[SharingKeys]) -> int:
    return next(_iter_tree(members, keys))[3]


def _split_subtrees(sizes: Sequence[int], keys: Sequence[SharingKeys], root: int) -> list[list[int]]:
    """The branches of each group by the token that follows the root."""
    trees: list[list[int]] = []
    start = 0
    for size in sizes:
        by_next: dict[int, list[int]] = {}
        for member in range(start, start + size):
            by_next.setdefault(int(keys[member][root]) if len(keys[member]) > root else -(2**62), []).append(member)
        trees += by_next.values()
        start += size
    return trees
