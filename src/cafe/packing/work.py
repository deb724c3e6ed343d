"""The work in a pack: the tokens that the language model computes, and the keys that each of them attends to.

Padding is no work, and what branches share counts once. Only keys that are seen count: what a mask hides is no work
either, whether or not an implementation of attention computes it.
"""

from dataclasses import astuple, dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from cafe.packing.pack import PackedBatch


@dataclass(frozen=True)
class PackWork:
    """Count the work of one forward pass of the language model; works can be added, and scaled to more data.

    Attributes:
        tokens: the number of tokens, without padding.
        seen: the number of (query, key) pairs of one layer in which the query attends to the key.
        read: the number of tokens whose last hidden state is read, for which alone the last layer is needed.
        read_seen: the number of pairs of `seen` whose query is read.
    """

    tokens: float = 0.0
    seen: float = 0.0
    read: float = 0.0
    read_seen: float = 0.0

    def __add__(self, other: "PackWork") -> "PackWork":
        """Add the work of another forward pass."""
        return PackWork(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> "PackWork":
        """Scale all counts."""
        return PackWork(*(factor * count for count in astuple(self)))


NO_WORK = PackWork()


def count_work(pack: PackedBatch) -> PackWork:
    """Count the work in a pack, whose tokens attend to what precedes them in their branch and to themselves.

    Families whose prompts or images are bidirectional, which do not share prefixes, attend to more than is counted.

    Args:
        pack: the packed branches.
    """
    if pack.tree is not None:
        keys = count_visible_keys(pack.tree.subtree_end)
        # The padding at the end of a row is a tree of its own.
        seen = sum(int(row[:length].sum()) for row, length in zip(keys, pack.row_lengths, strict=True))
    else:
        # One branch per row, padded on the right: a token attends to all that are not to its right.
        valid = pack.inputs["attention_mask"]
        keys = valid.cumsum(1)
        seen = int(keys[valid.bool()].sum())
    # A token may be read for both losses, or by several branches.
    rows, columns = torch.cat([pack.embedding_index, pack.logits_index]).unique(dim=0).unbind(1)
    return PackWork(pack.num_tokens, seen, len(rows), int(keys[rows, columns].sum()))


def count_visible_keys(subtree_end: Int64[Tensor, "rows columns"]) -> Int64[Tensor, "rows columns"]:
    """Count the keys that each token of a tree attends to: its ancestors and itself.

    Args:
        subtree_end: for each token, the column one past the last token below it.
    """
    # Each column opens one subtree. Those that have ended by a column do not hold its token; all others do.
    rows, columns = subtree_end.shape
    ended = subtree_end.new_zeros(rows, columns + 1)
    ended.scatter_add_(1, subtree_end, torch.ones_like(subtree_end))
    return (1 - ended[:, :columns]).cumsum(1)
