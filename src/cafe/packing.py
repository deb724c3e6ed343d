"""Prefix trees in rows: what branches share is laid out, and computed, once.

Branches that begin with the same tokens (system prompt, image) form a tree. A row holds trees in depth-first order:
a prefix once, then what follows it on each branch. Then one number a token says everything about attention: `end`, one
past the last token below it in its tree. Token i sees token j exactly if j <= i < end[j], that is, if j is i's ancestor
or i itself; a token's position is the number of its ancestors.

             shared prefix      | query's own | dialogue's own          | another tree
    tokens   <system> <image>     Compress …    Describe … A red circle.  <system> A red …
    position 0 1 2 3 4            5 6           5 6 7 8 9                 0 1 2

Pure tensors: no model, no file.
"""

import heapq
import math
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.utils.rnn import pad_sequence

from cafe.pixels import Normalization, Pixels, as_bytes

BLOCK = 128  # tokens a side of FlexAttention's blocks

Positions = Callable[["Branch"], Int64[Tensor, "axes tokens"]]
TokenTypes = Callable[["Branch"], Int64[Tensor, " tokens"]]


@dataclass(frozen=True, eq=False)
class Branch:
    """One token sequence the model must read, and the pictures it shows.

    Attributes:
        input_ids: the tokens, image tokens included.
        supervised: which tokens the language loss is taken on.
        shown: which tokens stand for pictures.
        vision: the image processor's tensors by name; empty without images. Branches that show the same pictures
            share the same mapping: pictures are compared by identity.
    """

    input_ids: Int64[Tensor, " tokens"]
    supervised: Bool[Tensor, " tokens"]
    shown: Bool[Tensor, " tokens"]
    vision: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    def cut(self, length: int) -> "Branch":
        """The first tokens; all pictures must be among them."""
        return Branch(self.input_ids[:length], self.supervised[:length], self.shown[:length], self.vision)


@dataclass(frozen=True)
class Layout:
    """Where the tokens of some branches lie in rows.

    Attributes:
        input_ids: filled up with `pad` behind each row's last token.
        position_ids: one axis, or three for M-RoPE.
        end: of each token, the column one past the last token below it; padding sees itself alone.
        filled: which places hold a token.
        places: for each branch, the (row, column) of each of its tokens.
        pictures: for each set of pictures, in the order of their tokens, the first branch that shows it.
    """

    input_ids: Int64[Tensor, "rows columns"]
    position_ids: Int64[Tensor, "axes rows columns"]
    end: Int64[Tensor, "rows columns"]
    filled: Bool[Tensor, "rows columns"]
    places: list[Int64[Tensor, "tokens 2"]]
    pictures: list[int]


def count_up(branch: Branch) -> Int64[Tensor, "1 tokens"]:
    """Position ids of a plain family: 0, 1, 2, ..."""
    return torch.arange(len(branch))[None]


def mark_pictures(branch: Branch) -> Int64[Tensor, " tokens"]:
    """1 where a token is replaced by a picture's features, 0 elsewhere."""
    return branch.shown.long()


def mark_answers(branch: Branch) -> Int64[Tensor, " tokens"]:
    """0 in the prompt, which prefix-LMs read both ways, 1 from the first supervised token on."""
    return (branch.supervised.cumsum(0) > 0).long()


@dataclass(frozen=True)
class Packing:
    """How branches become packs.

    Attributes:
        share: lay branches out as trees; without it every branch is a row by itself, padded on the right, and the
            model makes its own mask and position ids.
        columns: the most tokens in a row of trees.
        multiple: rows are filled up to a multiple of this many tokens, so that their shapes are few.
        pad: the token that fills up rows.
        positions: the position ids of a branch that is alone in its row.
        token_types: inputs that mark tokens, by name, for models that want one where branches do not share.
        normalization: pack pictures as bytes, of which this makes the model's values; as they are without it.
    """

    share: bool = True
    columns: int = 1024
    multiple: int = 1
    pad: int = 0
    positions: Positions = count_up
    token_types: Mapping[str, TokenTypes] = field(default_factory=dict)
    normalization: Normalization | None = None


PLAIN = Packing()


@dataclass(frozen=True)
class Pack:
    """What goes through the model at once.

    Attributes:
        inputs: the model's inputs by name, without the attention mask of trees, which is made from `end`.
        end: see `Layout`; None where branches do not share.
        readouts: the (row, column) of the last token of each embedded branch, in their order.
        predictors: the (row, column) of the tokens before each supervised token.
        labels: the supervised tokens.
        filled: the tokens that are not padding.
        pixels: what makes values of `pixel_values`, where these are bytes.
    """

    inputs: dict[str, Tensor]
    end: Int64[Tensor, "rows columns"] | None
    readouts: Int64[Tensor, "readouts 2"]
    predictors: Int64[Tensor, "supervised 2"]
    labels: Int64[Tensor, " supervised"]
    filled: int
    pixels: Pixels | None = None

    def pin_memory(self) -> "Pack":
        """The same in memory that a GPU copies from while it computes."""
        return replace(
            self,
            inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()},
            end=None if self.end is None else self.end.pin_memory(),
            readouts=self.readouts.pin_memory(),
            predictors=self.predictors.pin_memory(),
            labels=self.labels.pin_memory(),
        )


def pack(embedded: Sequence[Sequence[Branch]], spoken: Sequence[Sequence[Branch]], packing: Packing = PLAIN) -> Pack:
    """Lays out the branches of some examples for the model.

    Args:
        embedded: for each example the branches whose last token is a readout.
        spoken: for each example the branches whose supervised tokens are to be predicted.
        packing: how.
    """
    groups = [[*first, *second] for first, second in zip(embedded, spoken, strict=True)]
    layout = lay_out(groups, packing)
    branches = [branch for group in groups for branch in group]
    wants = [index < len(first) for first, group in zip(embedded, groups, strict=True) for index in range(len(group))]
    readouts, predictors, labels = [], [], []
    for branch, place, embeds in zip(branches, layout.places, wants, strict=True):
        if embeds:
            readouts.append(place[-1])
        else:
            said = branch.supervised.nonzero()[:, 0]
            said = said[said > 0]
            predictors.append(place[said - 1])
            labels.append(branch.input_ids[said])
    pictures, pixels = [branches[first].vision for first in layout.pictures], None
    if packing.normalization:
        pictures, pixels = as_bytes(pictures, packing.normalization)
    inputs = {"input_ids": layout.input_ids, **collate_vision(pictures)}
    if packing.share:
        inputs["position_ids"] = layout.position_ids[0] if len(layout.position_ids) == 1 else layout.position_ids
    else:
        inputs["attention_mask"] = layout.filled.long()
        for name, types in packing.token_types.items():
            inputs[name] = torch.zeros_like(layout.input_ids)
            for branch, place in zip(branches, layout.places, strict=True):
                inputs[name][place[:, 0], place[:, 1]] = types(branch)
    nowhere = torch.empty(0, 2, dtype=torch.long)
    return Pack(
        inputs,
        layout.end if packing.share else None,
        torch.stack(readouts) if readouts else nowhere,
        torch.cat([nowhere, *predictors]),
        torch.cat([nowhere[:, 0], *labels]),
        int(layout.filled.sum()),
        pixels,
    )


def lay_out(groups: Sequence[Sequence[Branch]], packing: Packing) -> Layout:
    """Lays branches out in rows of at most `packing.columns` tokens.

    Groups (the branches of one example) are cut into trees that share more than what all branches share, and the trees
    are spread over rows. Rows are longer than `columns` only where a tree is.

    Args:
        groups: branches; `Layout.places` has them in this order, group after group.
        packing: how.
    """
    branches = [branch for group in groups for branch in group]
    if packing.share:
        keys = _keys(branches)
        root = _common(keys) if len(branches) > 1 else 0
        trees = _trees([len(group) for group in groups], keys, root)
        rows = [
            _row(members, keys)
            for members in _fill(trees, [_size(tree, keys) for tree in trees], root, packing.columns)
        ]
    else:
        rows = [_Row.alone(number, len(branch)) for number, branch in enumerate(branches)]

    places: list[Tensor] = [torch.empty(0, 2, dtype=torch.long)] * len(branches)
    for number, row in enumerate(rows):
        for member, taken in row.columns.items():
            places[member] = torch.stack([torch.full((len(taken),), number), torch.from_numpy(taken)], dim=1)
    ends = [torch.from_numpy(row.end) for row in rows]
    end = pad_sequence(ends, batch_first=True, padding_value=-1)
    end = torch.nn.functional.pad(end, (0, -end.shape[1] % packing.multiple), value=-1)
    filled = end >= 0
    end = torch.where(filled, end, torch.arange(1, end.shape[1] + 1))
    input_ids = torch.full_like(end, packing.pad)
    positions = packing.positions if packing.share else count_up
    position_ids = torch.zeros(len(positions(branches[0])), *end.shape, dtype=torch.long)
    for branch, place in zip(branches, places, strict=True):
        input_ids[place[:, 0], place[:, 1]] = branch.input_ids
        position_ids[:, place[:, 0], place[:, 1]] = positions(branch)
    return Layout(input_ids, position_ids, end, filled, places, _pictures(branches, places))


def tree_mask(end: Int64[Tensor, "rows columns"]) -> Bool[Tensor, "rows 1 columns columns"]:
    """Who sees whom, densely: True where the second-last dimension's token may look at the last one's."""
    at = torch.arange(end.shape[1], device=end.device)
    return ((at[None, :] <= at[:, None]) & (at[:, None] < end[:, None, :]))[:, None]


def tree_block_mask(end: Int64[Tensor, "rows columns"]) -> BlockMask:
    """The same for FlexAttention, which skips the blocks of 128 x 128 tokens that hold nothing to see.

    What a block holds follows from the smallest and largest `end` among its keys: no mask of all tokens is made.
    """

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[row, key])

    def sees_alone(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[0, key])

    rows, columns = end.shape
    blocks = torch.nn.functional.pad(end, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    least, most = (found[:, None, None, :] for found in blocks.aminmax(dim=2))
    at = torch.arange(blocks.shape[1], device=end.device)
    first = BLOCK * at[:, None]  # query of each block
    some = (at <= at[:, None]) & (first < most)
    full = (at < at[:, None]) & (first + BLOCK <= least)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees_alone if rows == 1 else sees,
        seq_lengths=(columns, columns),
    )


def _listed(blocks: Bool[Tensor, "rows 1 queries keys"]) -> tuple[Tensor, Tensor]:
    """For each block of queries, how many blocks of keys are meant, and all blocks' numbers, these first."""
    return blocks.sum(-1, dtype=torch.int32), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


Keys = NDArray[np.int64]


@dataclass(frozen=True)
class _Row:
    """One row: `end` of each token, and the columns of each member branch's tokens."""

    end: Keys
    columns: dict[int, Keys]

    @classmethod
    def alone(cls, member: int, length: int) -> "_Row":
        return cls(np.full(length, length), {member: np.arange(length)})


def _keys(branches: Sequence[Branch]) -> list[Keys]:
    """Each branch as numbers that are equal exactly where its tokens can be shared.

    Pictures that were processed together are shared all or none: the key of their tokens stands for the whole set and
    for the words between them.
    """
    known: dict[tuple[int, bytes], int] = {}
    keys = []
    for branch in branches:
        ids = branch.input_ids.numpy().copy()
        if branch.shown.any():
            shown = branch.shown.numpy()
            number = known.setdefault((id(branch.vision), ids[: np.flatnonzero(shown)[-1] + 1].tobytes()), len(known))
            ids[shown] = -1 - number
        keys.append(ids)
    return keys


def _common(keys: Sequence[Keys], start: int = 0) -> int:
    """How many first numbers all have in common; the first `start` are known to be."""
    first, length = keys[0], min(map(len, keys))
    for other in keys[1:]:
        parted = np.flatnonzero(first[start:length] != other[start:length])
        length = start + int(parted[0]) if len(parted) else length
    return length


def _nodes(members: Sequence[int], keys: Sequence[Keys], start: int = 0) -> Iterator[tuple[int, int, list[int], int]]:
    """The tree of some branches, depth first: (start, stop, members, size) of each node.

    A node is the stretch of tokens from `start` to `stop` that its members share; `size` counts the tokens of the node
    and all below it.
    """
    stop = _common([keys[member] for member in members], start)
    beyond = sorted((member for member in members if len(keys[member]) > stop), key=lambda member: keys[member][stop])
    below = [
        node
        for _, part in groupby(beyond, lambda member: keys[member][stop])
        for node in _nodes(list(part), keys, stop)
    ]
    yield start, stop, list(members), stop - start + sum(node[1] - node[0] for node in below)
    yield from below


def tree_size(branches: Sequence[Branch]) -> int:
    """The tokens of some branches with what they share counted once."""
    return _size(range(len(branches)), _keys(branches))


def count_crops(branches: Sequence[Branch]) -> int:
    """The pictures, or parts of pictures, that the vision tower reads for some branches."""
    visions = {id(branch.vision): branch.vision for branch in branches if "pixel_values" in branch.vision}
    return sum(_crops(vision) for vision in visions.values())


def _crops(vision: Mapping[str, Tensor]) -> int:
    rows = vision.get("image_grid_thw", vision["pixel_values"])  # patches of several pictures are joined, grids are not
    return math.prod(rows.shape[:-3]) if rows.ndim > 3 else len(rows)


def _size(members: Sequence[int], keys: Sequence[Keys]) -> int:
    return next(_nodes(members, keys))[3]


def _trees(sizes: Sequence[int], keys: Sequence[Keys], root: int) -> list[list[int]]:
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


_Filled = list[tuple[int, list[int]]]  # of each row, its tokens and its trees


def _fill(trees: Sequence[list[int]], sizes: Sequence[int], root: int, columns: int) -> list[list[int]]:
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
            found = min(found, _spread(own, root, count), key=work_of)
    return [[branch for tree in row for branch in trees[tree]] for _, row in found]


def _best_fit(own: Sequence[int], root: int, columns: int) -> _Filled:
    """Trees to rows of at most so many columns, the largest first, each to the fullest row that has room for it."""
    rows: _Filled = []  # the emptiest first
    for tree in _largest_first(own):
        roomy = bisect_right(rows, columns - own[tree], key=itemgetter(0))
        tokens, row = rows.pop(roomy - 1) if roomy else (root, [])
        insort(rows, (tokens + own[tree], [*row, tree]))
    return rows


def _spread(own: Sequence[int], root: int, count: int) -> _Filled:
    """Trees over so many rows, the largest first, each to the emptiest row."""
    rows: _Filled = [(root, []) for _ in range(count)]
    for tree in _largest_first(own):
        tokens, row = rows[0]
        heapq.heapreplace(rows, (tokens + own[tree], [*row, tree]))
    return [each for each in rows if each[1]]


def _largest_first(own: Sequence[int]) -> list[int]:
    return sorted(range(len(own)), key=lambda tree: -own[tree])


def _row(members: Sequence[int], keys: Sequence[Keys]) -> _Row:
    """The trees of some branches in one row. Branches that share no first token stand side by side."""
    columns: dict[int, Keys] = {member: np.empty(len(keys[member]), np.int64) for member in members}
    ends: list[Keys] = []
    at = 0
    for start, stop, sharing, size in _nodes(members, keys):
        for member in sharing:
            columns[member][start:stop] = np.arange(at, at + stop - start)
        ends.append(np.full(stop - start, at + size))
        at += stop - start
    return _Row(np.concatenate(ends), columns)


def _pictures(branches: Sequence[Branch], places: Sequence[Tensor]) -> list[int]:
    """The first branch to show each laid-out set of pictures, in the order of the sets' first tokens."""
    found: dict[tuple[int, int], int] = {}
    for number, (branch, place) in enumerate(zip(branches, places, strict=True)):
        if branch.shown.any():
            row, column = place[branch.shown][0].tolist()
            found.setdefault((row, column), number)
    return [found[place] for place in sorted(found)]


def collate_vision(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Joins the vision tensors of several sequences along their first dimension, padding the others with zeros."""
    names = {name for part in parts for name in part}
    return {name: _cat_padded([part[name] for part in parts if name in part]) for name in sorted(names)}


def _cat_padded(tensors: Sequence[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = [
        torch.nn.functional.pad(
            tensor,
            [
                amount
                for size, full in zip(tensor.shape[:0:-1], shape[::-1], strict=True)
                for amount in (0, full - size)
            ],
        )
        for tensor in tensors
    ]
    return torch.cat(padded)
