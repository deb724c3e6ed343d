"""How the trees of branches are laid out in rows."""

import heapq
import math
from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cafe.images.normalization import Normalization
from cafe.packing.branch import Branch, PositionIdsFn, TokenTypeFn, default_position_ids
from cafe.packing.tree import (
    SharingKeys,
    _common_prefix_length,
    _iter_tree,
    _num_tokens,
    _sharing_keys,
    _split_subtrees,
)


@dataclass(frozen=True)
class Layout:
    """Where the tokens of some branches lie in rows.

    Attributes:
        input_ids: filled up with `pad` behind each row's last token.
        position_ids: one axis, or three for M-RoPE.
        subtree_end: of each token, the column one past the last token below it; padding sees itself alone.
        valid: which places hold a token.
        coords: for each branch, the (row, column) of each of its tokens.
        image_order: for each set of pictures, in the order of their tokens, the first branch that shows it.
    """

    input_ids: Int64[Tensor, "rows columns"]
    position_ids: Int64[Tensor, "axes rows columns"]
    subtree_end: Int64[Tensor, "rows columns"]
    valid: Bool[Tensor, "rows columns"]
    coords: list[Int64[Tensor, "tokens 2"]]
    image_order: list[int]


@dataclass(frozen=True)
class PackingConfig:
    """How branches become packs.

    Attributes:
        share_prefixes: lay branches out as trees; without it every branch is a row by itself, padded on the right, and the
            model makes its own mask and position ids.
        max_row_tokens: the most tokens in a row of trees.
        pad_to_multiple_of: rows are filled up to a multiple of this many tokens, so that their shapes are few.
        pad_token_id: the token that fills up rows.
        position_ids_fn: the position ids of a branch that is alone in its row.
        token_type_fns: inputs that mark tokens, by name, for models that want one where branches do not share.
        normalization: pack pictures as bytes, of which this makes the model's values; as they are without it.
    """

    share_prefixes: bool = True
    max_row_tokens: int = 1024
    pad_to_multiple_of: int = 1
    pad_token_id: int = 0
    position_ids_fn: PositionIdsFn = default_position_ids
    token_type_fns: Mapping[str, TokenTypeFn] = field(default_factory=dict)
    normalization: Normalization | None = None


DEFAULT_PACKING = PackingConfig()


def build_layout(groups: Sequence[Sequence[Branch]], packing: PackingConfig) -> Layout:
    """Lays branches out in rows of at most `packing.columns` tokens.

    Groups (the branches of one example) are cut into trees that share more than what all branches share, and the trees
    are spread over rows. Rows are longer than `columns` only where a tree is.

    Args:
        groups: branches; `Layout.places` has them in this order, group after group.
        packing: how.
    """
    branches = [branch for group in groups for branch in group]
    if packing.share_prefixes:
        keys = _sharing_keys(branches)
        root = _common_prefix_length(keys) if len(branches) > 1 else 0
        trees = _split_subtrees([len(group) for group in groups], keys, root)
        rows = [
            _row(members, keys)
            for members in _bin_pack(trees, [_num_tokens(tree, keys) for tree in trees], root, packing.max_row_tokens)
        ]
    else:
        rows = [_Row.alone(number, len(branch)) for number, branch in enumerate(branches)]

    places: list[Tensor] = [torch.empty(0, 2, dtype=torch.long)] * len(branches)
    for number, row in enumerate(rows):
        for member, taken in row.columns.items():
            places[member] = torch.stack([torch.full((len(taken),), number), torch.from_numpy(taken)], dim=1)
    ends = [torch.from_numpy(row.subtree_end) for row in rows]
    end = pad_sequence(ends, batch_first=True, padding_value=-1)
    end = torch.nn.functional.pad(end, (0, -end.shape[1] % packing.pad_to_multiple_of), value=-1)
    filled = end >= 0
    end = torch.where(filled, end, torch.arange(1, end.shape[1] + 1))
    input_ids = torch.full_like(end, packing.pad_token_id)
    positions = packing.position_ids_fn if packing.share_prefixes else default_position_ids
    position_ids = torch.zeros(len(positions(branches[0])), *end.shape, dtype=torch.long)
    for branch, place in zip(branches, places, strict=True):
        input_ids[place[:, 0], place[:, 1]] = branch.input_ids
        position_ids[:, place[:, 0], place[:, 1]] = positions(branch)
    return Layout(input_ids, position_ids, end, filled, places, _image_order(branches, places))


@dataclass(frozen=True)
class _Row:
    """One row: `subtree_end` of each token, and the columns of each member branch's tokens."""

    subtree_end: SharingKeys
    columns: dict[int, SharingKeys]

    @classmethod
    def alone(cls, member: int, length: int) -> "_Row":
        return cls(np.full(length, length), {member: np.arange(length)})


_Filled = list[tuple[int, list[int]]]  # of each row, its tokens and its trees


def _bin_pack(trees: Sequence[list[int]], sizes: Sequence[int], root: int, columns: int) -> list[list[int]]:
    """Trees to rows of at most `columns` tokens: filled best-fit, or evenly where that makes less work.

    Where the largest tree is longer than that, rows may be an eighth longer than it, for small trees beside large ones.
    What fits in one row goes there. The root is there once a row. The work of a token is that of the layers' matrices,
    as of attention over three times the columns, and attention over its row: many rows leave more padding, long ones
    take more attention.
    """
    largest = max(sizes)
    columns = columns if largest <= columns else largest + largest // 8
    own = [size - root for size in sizes]
    least = max(1, math.ceil(sum(own) / max(1, columns - root)))

    def work(count: int, longest: int) -> float:
        return count * longest * (3 * columns + longest) if longest <= columns else math.inf

    def work_of(rows: _Filled) -> float:
        return work(len(rows), max(tokens for tokens, _ in rows))

    found = _best_fit(own, root, columns)
    for count in range(least, 2 * least + 1) if least > 1 else ():
        shortest = max(largest, root + math.ceil(sum(own) / count))  # that the longest of so many rows can be
        if work(count, shortest) < work_of(found):
            found = min(found, _balance_rows(own, root, count), key=work_of)
    return [[branch for tree in row for branch in trees[tree]] for _, row in found]


def _best_fit(own: Sequence[int], root: int, columns: int) -> _Filled:
    """Trees to rows of at most so many columns, the largest first, each to the fullest row that has room for it."""
    rows: _Filled = []  # the emptiest first
    for tree in _largest_first(own):
        roomy = bisect_right(rows, columns - own[tree], key=itemgetter(0))
        tokens, row = rows.pop(roomy - 1) if roomy else (root, [])
        insort(rows, (tokens + own[tree], [*row, tree]))
    return rows


def _balance_rows(own: Sequence[int], root: int, count: int) -> _Filled:
    """Trees over so many rows, the largest first, each to the emptiest row."""
    rows: _Filled = [(root, []) for _ in range(count)]
    for tree in _largest_first(own):
        tokens, row = rows[0]
        heapq.heapreplace(rows, (tokens + own[tree], [*row, tree]))
    return [each for each in rows if each[1]]


def _largest_first(own: Sequence[int]) -> list[int]:
    return sorted(range(len(own)), key=lambda tree: -own[tree])


def _row(members: Sequence[int], keys: Sequence[SharingKeys]) -> _Row:
    """The trees of some branches in one row. Branches that share no first token stand side by side."""
    columns: dict[int, SharingKeys] = {member: np.empty(len(keys[member]), np.int64) for member in members}
    ends: list[SharingKeys] = []
    at = 0
    for start, stop, sharing, size in _iter_tree(members, keys):
        for member in sharing:
            columns[member][start:stop] = np.arange(at, at + stop - start)
        ends.append(np.full(stop - start, at + size))
        at += stop - start
    return _Row(np.concatenate(ends), columns)


def _image_order(branches: Sequence[Branch], places: Sequence[Tensor]) -> list[int]:
    """The first branch to show each laid-out set of pictures, in the order of the sets' first tokens."""
    found: dict[tuple[int, int], int] = {}
    for number, (branch, place) in enumerate(zip(branches, places, strict=True)):
        if branch.image_mask.any():
            row, column = place[branch.image_mask][0].tolist()
            found.setdefault((row, column), number)
    return [found[place] for place in sorted(found)]
