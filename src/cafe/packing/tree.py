"""The prefix trees of branches: what they have in common, and where they diverge.

Branches are compared by sharing keys: integers that are equal exactly where tokens may be computed once for both.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cafe.packing.branch import Branch

SharingKeys = NDArray[np.int64]

NO_PARENT = -1  # of the root
NO_TOKEN = -(2**62)  # stands for the next key of a branch that ends; no token or image has this key


class Node(NamedTuple):
    """Hold one node of a tree: the tokens from `start` to `stop` that all its members share.

    Attributes:
        start: the depth of the node's first token.
        stop: the depth one past its last token.
        members: the branches that pass through the node.
        size: the tokens of the node and of all nodes below it.
    """

    start: int
    stop: int
    members: list[int]
    size: int

    @property
    def length(self) -> int:
        """Return the number of tokens in the node itself."""
        return self.stop - self.start


def compute_sharing_keys(branches: Sequence[Branch]) -> list[SharingKeys]:
    """Compute the sharing keys of each branch.

    The images of a branch are processed together, so they are shared together or not at all: the key of an image token
    stands for all images of the branch and for the text up to the last of them. It is negative.
    """
    image_keys: dict[tuple[int, bytes], int] = {}
    keys = []
    for branch in branches:
        ids = branch.input_ids.numpy().copy()
        if branch.image_mask.any():
            # Image tokens have the same id whatever the image: identify the images by the object that holds them.
            mask = branch.image_mask.numpy()
            # Text between images counts: branches that diverged there would share some images of an indivisible set.
            stop = np.flatnonzero(mask)[-1] + 1
            prefix = ids[:stop].tobytes()
            number = image_keys.setdefault((id(branch.image_inputs), prefix), len(image_keys))
            ids[mask] = -1 - number  # below 0: never equal to a token id
        keys.append(ids)
    return keys


def common_prefix_length(keys: Sequence[SharingKeys], start: int = 0) -> int:
    """Count the leading keys that all have in common; the first `start` are known to be equal."""
    first = keys[0]
    length = min(map(len, keys))
    for other in keys[1:]:
        # Compare up to the shortest prefix so far: it only gets shorter.
        different = np.flatnonzero(first[start:length] != other[start:length])
        if len(different):
            length = start + int(different[0])
    return length


def tree_nodes(members: Sequence[int], keys: Sequence[SharingKeys]) -> list[Node]:
    """List the nodes of the tree that some branches form, depth first; the children of a node by size, largest first.

    Where a long continuation directly follows its prefix, fewer blocks of the mask tend to be partly visible.
    Children of equal size are in the order of their next keys, so that the same data gives the same rows.
    """
    nodes, children = _split_nodes(members, keys)
    # From the last node to the first, each adds the sizes of its children, complete by then.
    sizes = [node.length for node in nodes]
    for index in reversed(range(len(nodes))):
        sizes[index] += sum(sizes[child] for child in children[index])

    # Depth first, now that sizes are known: the largest child is put on the stack last, and so comes off first.
    ordered: list[Node] = []
    pending = [0]
    while pending:
        index = pending.pop()
        ordered.append(nodes[index]._replace(size=sizes[index]))
        pending += sorted(children[index], key=sizes.__getitem__)
    return ordered


def _split_nodes(members: Sequence[int], keys: Sequence[SharingKeys]) -> tuple[list[Node], list[list[int]]]:
    """List the nodes of a tree, parents before children, with their own lengths as sizes, and the children of each.

    Children are indices of nodes, the one with the highest next key first.
    """
    nodes: list[Node] = []
    children: list[list[int]] = []
    # A list of what is still to do, not recursion: a tree may be deeper than Python's stack. Each entry has branches
    # that pass through a node, the depth where the node begins, and the index of its parent.
    pending = [(list(members), 0, NO_PARENT)]
    while pending:
        passing, start, parent = pending.pop()
        stop = common_prefix_length([keys[member] for member in passing], start)
        if parent != NO_PARENT:
            children[parent].append(len(nodes))
        # Branches that continue below this node, grouped by their next key: one child for each, the last one on top.
        next_key = {member: keys[member][stop] for member in passing if len(keys[member]) > stop}
        longer = sorted(next_key, key=next_key.__getitem__)
        pending += [(list(below), stop, len(nodes)) for _, below in groupby(longer, next_key.__getitem__)]
        nodes.append(Node(start, stop, passing, stop - start))
        children.append([])
    return nodes, children


def tree_size(members: Sequence[int], keys: Sequence[SharingKeys]) -> int:
    """Count the tokens of the tree that some branches form."""
    return tree_nodes(members, keys)[0].size


def count_unique_tokens(branches: Sequence[Branch]) -> int:
    """Count the tokens of some branches, shared ones once."""
    return tree_size(range(len(branches)), compute_sharing_keys(branches))


def split_subtrees(group_sizes: Sequence[int], keys: Sequence[SharingKeys], root: int) -> list[list[int]]:
    """Split the branches of each group by the key that follows the root, which all branches share.

    Args:
        group_sizes: the number of branches in each group; groups follow each other in `keys`.
        keys: the sharing keys of all branches.
        root: the number of tokens that all branches share.
    """
    trees: list[list[int]] = []
    start = 0
    for size in group_sizes:
        # Branches that end with the root have no next key and form one tree.
        by_next_key: dict[int, list[int]] = {}
        for member in range(start, start + size):
            next_key = NO_TOKEN
            if len(keys[member]) > root:
                next_key = int(keys[member][root])
            by_next_key.setdefault(next_key, []).append(member)
        trees += by_next_key.values()
        start += size
    return trees
