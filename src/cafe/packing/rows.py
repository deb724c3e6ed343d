"""Layout: the trees of branches placed in rows of bounded length."""

import heapq
import math
from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cafe.attention.tree import Kernel
from cafe.images.normalization import Normalization
from cafe.packing.branch import Branch, PositionIdsFn, TokenTypeFn, default_position_ids
from cafe.packing.tree import (
    SharingKeys,
    common_prefix_length,
    compute_sharing_keys,
    split_subtrees,
    tree_nodes,
    tree_size,
)


@dataclass(frozen=True)
class Layout:
    """Hold where the tokens of some branches lie in rows.

    Attributes:
        input_ids: the tokens; each row is padded on the right with `pad_token_id`.
        position_ids: one axis, or three for M-RoPE.
        subtree_end: for each token, the column one past the last token below it; the padding of a row is one more tree.
        valid: False for padding.
        coords: for each branch, the (row, column) of each of its tokens.
        image_order: for each distinct set of images, in the order of their tokens, the first branch that holds it.
    """

    input_ids: Int64[Tensor, "rows columns"]
    position_ids: Int64[Tensor, "axes rows columns"]
    subtree_end: Int64[Tensor, "rows columns"]
    valid: Bool[Tensor, "rows columns"]
    coords: list[Int64[Tensor, "_tokens 2"]]
    image_order: list[int]


@dataclass(frozen=True)
class PackingConfig:
    """Configure how branches are packed.

    Attributes:
        share_prefixes: lay branches out as trees. Without it every branch is a row of its own, padded on the right, and
            the model makes its own mask and position ids.
        kernel: how attention over the trees is computed, see `cafe.attention.tree`.
        max_row_tokens: the maximum number of tokens in a row of trees, except where a tree or a prefix is long; see
            `build_layout`.
        pad_to_multiple_of: pad rows to a multiple of this many tokens, so that there are few different shapes.
        pad_token_id: the padding token.
        position_ids_fn: computes the position ids of a branch that is alone in its row.
        token_type_fns: for models that take inputs which mark tokens, functions that compute them by input name; used
            where branches do not share prefixes.
        normalization: pack images as bytes, from which this computes the model's pixel values; None packs them as they
            are.
    """

    share_prefixes: bool = True
    kernel: Kernel = "mask"
    max_row_tokens: int = 1024
    pad_to_multiple_of: int = 1
    pad_token_id: int = 0
    position_ids_fn: PositionIdsFn = default_position_ids
    token_type_fns: Mapping[str, TokenTypeFn] = field(default_factory=dict)
    normalization: Normalization | None = None


DEFAULT_PACKING = PackingConfig()


def build_layout(groups: Sequence[Sequence[Branch]], packing: PackingConfig) -> Layout:
    """Lay branches out in rows of at most `packing.max_row_tokens` tokens.

    Groups (the branches of one example) are split into trees that share more than all branches do. Trees of different
    groups are merged where that saves much, and the trees are distributed over rows. A row is longer than the maximum
    only where a single tree is, or where the branches' common prefix is so long that longer rows are less work.

    Args:
        groups: the branches; `Layout.coords` lists them in this order, group after group.
        packing: how to pack.
    """
    branches = list(chain.from_iterable(groups))
    if packing.share_prefixes:
        rows = _tree_rows(branches, list(map(len, groups)), packing.max_row_tokens)
        position_ids_fn = packing.position_ids_fn
    else:
        rows = _single_branch_rows(branches)
        position_ids_fn = default_position_ids  # not used: the model makes its own
    coords = _token_coords(rows, len(branches))
    subtree_end, valid = _pad_rows(rows, packing.pad_to_multiple_of)

    # Write tokens and positions branch by branch. Branches that share a token write the same values.
    input_ids = torch.full_like(subtree_end, packing.pad_token_id)
    position_ids = torch.zeros(len(position_ids_fn(branches[0])), *subtree_end.shape, dtype=torch.long)
    for branch, coord in zip(branches, coords, strict=True):
        input_ids[coord[:, 0], coord[:, 1]] = branch.input_ids
        position_ids[:, coord[:, 0], coord[:, 1]] = position_ids_fn(branch)
    return Layout(input_ids, position_ids, subtree_end, valid, coords, _image_order(branches, coords))


@dataclass(frozen=True)
class _Row:
    """Hold the `subtree_end` of each token of a row, and the columns of each branch's tokens."""

    subtree_end: SharingKeys
    columns: dict[int, SharingKeys]


def _token_coords(rows: Sequence[_Row], num_branches: int) -> list[Int64[Tensor, "_tokens 2"]]:
    """Return for each branch the (row, column) of each of its tokens."""
    coords: list[Tensor] = [torch.empty(0, 2, dtype=torch.long)] * num_branches
    for number, row in enumerate(rows):
        for member, columns in row.columns.items():
            row_numbers = torch.full((len(columns),), number)
            coords[member] = torch.stack([row_numbers, torch.from_numpy(columns)], dim=1)
    return coords


def _pad_rows(
    rows: Sequence[_Row], multiple: int
) -> tuple[Int64[Tensor, "rows columns"], Bool[Tensor, "rows columns"]]:
    """Pad rows to the same length, a multiple of `multiple`; return their `subtree_end`, and which tokens are valid."""
    ends = [torch.from_numpy(row.subtree_end) for row in rows]
    subtree_end = pad_sequence(ends, batch_first=True, padding_value=-1)
    missing = -subtree_end.shape[1] % multiple
    subtree_end = F.pad(subtree_end, (0, missing), value=-1)
    valid = subtree_end >= 0
    # Padding is one more tree of its row, a single chain: a token that attends to nothing would give NaN.
    return subtree_end.where(valid, subtree_end.shape[1]), valid


def _single_branch_rows(branches: Sequence[Branch]) -> list[_Row]:
    """Give every branch a row of its own."""
    rows = []
    for number, branch in enumerate(branches):
        length = len(branch)
        rows.append(_Row(np.full(length, length), {number: np.arange(length)}))
    return rows


def _tree_rows(branches: Sequence[Branch], group_sizes: Sequence[int], max_tokens: int) -> list[_Row]:
    """Distribute the trees that branches form over rows."""
    keys = compute_sharing_keys(branches)
    # What all branches share, usually the system prompt, is in every row once: it does not make trees of examples one.
    root = 0
    if len(keys) > 1:
        root = common_prefix_length(keys)
    trees = _merge_trees(split_subtrees(group_sizes, keys, root), keys, root, max_tokens)
    sizes = [tree_size(tree, keys) for tree in trees]
    members_by_row = _bin_pack(trees, sizes, root, _row_limit(root, max_tokens))
    return [_build_row(members, keys) for members in members_by_row]


def _merge_trees(
    trees: Sequence[list[int]], keys: Sequence[SharingKeys], root: int, max_tokens: int
) -> list[list[int]]:
    """Merge trees of different groups that show the same images, or that have half of their tokens in common.

    Whatever shares less is left apart: small trees fill rows better.

    Args:
        trees: the branches of each tree.
        keys: the sharing keys of all branches.
        root: the number of tokens that all trees share.
        max_tokens: the maximum number of tokens in a row.
    """
    # In the order of their keys, trees that share a prefix are neighbors. The first branch stands for its tree.
    runs: list[list[list[int]]] = []
    for tree in sorted(trees, key=lambda tree: keys[tree[0]].tobytes()):
        if runs and _is_worth_merging(runs[-1][0], tree, keys, root):
            runs[-1].append(tree)
        else:
            runs.append([tree])

    # A run that is too long for one tree is distributed over several, which are rows by themselves.
    merged: list[list[int]] = []
    for run in runs:
        whole = list(chain.from_iterable(run))
        prefix = common_prefix_length([keys[tree[0]] for tree in run])
        limit = _row_limit(prefix, max_tokens)
        if len(run) == 1 or tree_size(whole, keys) <= limit:
            merged.append(whole)
            continue
        merged += _bin_pack(run, [tree_size(tree, keys) for tree in run], prefix, limit)
    # In the order of the branches again: the order of the rows should not depend on tokens.
    return sorted(map(sorted, merged))


def _is_worth_merging(first: Sequence[int], second: Sequence[int], keys: Sequence[SharingKeys], root: int) -> bool:
    """Return whether two trees share images, or half of the tokens of the second, beyond what all trees share."""
    own_keys = keys[second[0]]
    prefix = common_prefix_length([keys[first[0]], own_keys])
    if prefix == root:
        return False
    shares_images = bool((own_keys[root:prefix] < 0).any())  # the keys of image tokens are negative
    return shares_images or 2 * (prefix - root) >= tree_size(second, keys) - root


def _row_limit(prefix: int, max_tokens: int) -> int:
    """Compute how long a row may be whose branches all begin with the same prefix.

    Each row repeats the prefix. If n rows hold it and, together, some other tokens, their work as in `_work`,
    n * length * (3 * max_tokens + length), is least where each row has sqrt(prefix * (3 * max_tokens + prefix)) others.
    """
    return max(max_tokens, prefix + math.isqrt(prefix * (3 * max_tokens + prefix)))


def _build_row(members: Sequence[int], keys: Sequence[SharingKeys]) -> _Row:
    """Write the trees of some branches into one row; branches without a common first token stand side by side."""
    columns: dict[int, SharingKeys] = {member: np.empty(len(keys[member]), np.int64) for member in members}
    ends: list[SharingKeys] = []
    column = 0
    for node in tree_nodes(members, keys):
        for member in node.members:
            columns[member][node.start : node.stop] = np.arange(column, column + node.length)
        # Depth first, all that is below a node follows it directly: the subtrees of its tokens end at the same column.
        ends.append(np.full(node.length, column + node.size))
        column += node.length
    return _Row(np.concatenate(ends), columns)


_Bins = list[tuple[int, list[int]]]  # for each row, its number of tokens and its trees

MAX_SPREAD = 16  # rows to try where trees would fit in fewer than half as many; more rows hardly save work
# The fraction of the work that splitting a single row must save. A row of unbounded length is never split: attention is
# a far smaller part of its estimated work.
MIN_SAVING = 0.01


def _bin_pack(trees: Sequence[list[int]], sizes: Sequence[int], root: int, max_tokens: int) -> list[list[int]]:
    """Distribute trees over rows of at most `max_tokens`: best fit, or evenly where that is less work.

    Args:
        trees: the branches of each tree.
        sizes: the tokens of each tree, root included.
        root: the tokens that all trees share; each row holds them once.
        max_tokens: the maximum number of tokens in a row.

    Returns:
        The branches of each row.
    """
    # Where a tree exceeds the maximum, rows may be an eighth longer than it, to hold small trees beside large ones.
    largest = max(sizes)
    if largest > max_tokens:
        max_tokens = largest + largest // 8
    # A row holds the root once, so that trees count without it.
    own_sizes = [size - root for size in sizes]
    total = sum(own_sizes)

    best = _best_fit(own_sizes, root, max_tokens)
    best_work = _work_of_bins(best, max_tokens)
    if len(best) == 1:
        best_work *= 1 - MIN_SAVING
    # Best fit leaves a short last row, padded to the longest, and long rows where shorter ones would cost less
    # attention. Rows of equal length may be less work: try each number of rows whose lower bound is below the best.
    min_rows = max(1, math.ceil(total / max(1, max_tokens - root)))
    max_rows = min(len(trees), max(2 * min_rows, MAX_SPREAD))
    for num_rows in range(min_rows, max_rows + 1):
        longest_at_least = max(largest, root + math.ceil(total / num_rows))
        if _work(num_rows, longest_at_least, max_tokens) >= best_work:
            continue
        bins = _balance_rows(own_sizes, root, num_rows)
        work = _work_of_bins(bins, max_tokens)
        if work < best_work:
            best, best_work = bins, work
    members_by_row = []
    for _, row in best:
        members_by_row.append(list(chain.from_iterable(trees[tree] for tree in row)))
    return members_by_row


def _work(num_rows: int, longest: int, max_tokens: int) -> float:
    """Estimate the work of rows: for each token, the layers' matrices and attention over its row.

    The matrices are taken as attention over three times the maximum row (see `set_kernel`). So many rows are costly
    by their padding, and long rows by their attention. Rows beyond the maximum are ruled out.
    """
    if longest > max_tokens:
        return math.inf
    return num_rows * longest * (3 * max_tokens + longest)


def _work_of_bins(bins: _Bins, max_tokens: int) -> float:
    """Estimate the work of rows that are filled, all padded to the longest."""
    longest, _ = max(bins, key=itemgetter(0))
    return _work(len(bins), longest, max_tokens)


def _best_fit(sizes: Sequence[int], root: int, max_tokens: int) -> _Bins:
    """Distribute trees over rows, the largest first, each to the fullest row that has room for it."""
    bins: _Bins = []  # sorted, the emptiest first
    for tree in _largest_first(sizes):
        # The fullest row with room is the last of those that have room.
        num_roomy = bisect_right(bins, max_tokens - sizes[tree], key=itemgetter(0))
        tokens, row = root, list[int]()  # a new row, which holds the root already
        if num_roomy:
            tokens, row = bins.pop(num_roomy - 1)
        insort(bins, (tokens + sizes[tree], [*row, tree]))
    return bins


def _balance_rows(sizes: Sequence[int], root: int, num_rows: int) -> _Bins:
    """Distribute trees over a number of rows, the largest first, each to the emptiest row."""
    bins: _Bins = [(root, []) for _ in range(num_rows)]  # a heap, the emptiest first
    for tree in _largest_first(sizes):
        tokens, row = bins[0]
        heapq.heapreplace(bins, (tokens + sizes[tree], [*row, tree]))
    # A row stays empty where there are fewer trees than rows.
    return [(tokens, row) for tokens, row in bins if row]


def _largest_first(sizes: Sequence[int]) -> list[int]:
    """Return the indices of trees; those of equal size keep their order, so that the same data gives the same rows."""
    return sorted(range(len(sizes)), key=lambda tree: -sizes[tree])


def _image_order(branches: Sequence[Branch], coords: Sequence[Tensor]) -> list[int]:
    """List the first branch to hold each set of images, in the order of the sets' first tokens."""
    first_holders: dict[tuple[int, int], int] = {}
    for number, (branch, coord) in enumerate(zip(branches, coords, strict=True)):
        image_coords = coord[branch.image_mask]
        if len(image_coords):
            # Branches that share images share the coordinates of their tokens.
            row, column = image_coords[0].tolist()
            first_holders.setdefault((row, column), number)
    return [first_holders[first_token] for first_token in sorted(first_holders)]
