"""Attention over long rows of trees on a CPU: of those tokens alone that see each other, not over all that is masked.

Dense, a row of trees computes every token with every other and throws most of it away. But the mask of a tree is made
of few blocks. A path, tokens that follow each other in the row and in the tree, is causal within itself, and the kernel
skips half of that. What else a token sees is the beginnings of paths that its own branches off from; all that branches
off there sees the same, and nothing is hidden. So each block is a call of PyTorch's kernel, on views. Where a token is
in several, they are joined as FlashAttention joins its own, by the logarithms of their sums (Dao et al., arXiv
2205.14135). On a GPU FlexAttention does this.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from cafe.attention.masks import tree_mask
from cafe.attention.sdpa_override import SdpaOverrideMask

MIN_BLOCKWISE_TOKENS = 768  # columns from which on the calls save more than they cost: `benchmarks/tree_attention.py`

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Block:
    """Tokens of a row that see others of it: a path itself, causally, or the beginning of a path all that branches off.

    Attributes:
        row: which.
        queries: the columns of those that see.
        keys: the columns of those that are seen; the same for a path.
    """

    row: int
    queries: slice
    keys: slice

    @property
    def causal(self) -> bool:
        """Whether it is a path."""
        return self.queries == self.keys

    def query_view(self, states: Shaped[Tensor, "rows heads columns *dim"]) -> Shaped[Tensor, "1 heads queries *dim"]:
        """A view of the states of those that see."""
        return states[self.row : self.row + 1, :, self.queries]

    def key_view(self, states: Shaped[Tensor, "rows heads columns *dim"]) -> Shaped[Tensor, "1 heads keys *dim"]:
        """A view of the states of those that are seen."""
        return states[self.row : self.row + 1, :, self.keys]


def tree_to_blocks(end: Int64[Tensor, "rows columns"]) -> list[Block]:
    """The blocks of some rows: those of a row's paths come before others.

    Tokens that see themselves alone, as padding does, are left out.
    """
    blocks: list[Block] = []
    for row, ends in enumerate(end.tolist()):
        paths = list(_chains(ends))
        blocks += [Block(row, path, path) for path in paths]
        for path in paths:
            blocks += [Block(row, queries, keys) for queries, keys in _branches(ends, path)]
    return blocks


def _chains(ends: Sequence[int]) -> Iterator[slice]:
    """A token begins a path where the token before it is not its parent."""
    starts = [0, *(column for column in range(1, len(ends)) if ends[column - 1] <= column)]
    last = 0  # of what has been seen to branch off
    for start, stop in zip(starts, [*starts[1:], len(ends)], strict=True):
        if stop > start + 1 or last > start:
            yield slice(start, stop)
        last = max(last, ends[start])


def _branches(ends: Sequence[int], path: slice) -> Iterator[tuple[slice, slice]]:
    """What lies behind a path and sees its first tokens: farther behind, fewer of them."""
    behind = path.stop
    for column in reversed(range(path.start, path.stop)):
        if ends[column] > behind:
            yield slice(behind, ends[column]), slice(path.start, column + 1)
            behind = ends[column]


def blockwise_mask(end: Int64[Tensor, "rows columns"]) -> SdpaOverrideMask:
    """`tree_mask` of rows on a CPU, of which PyTorch's attention takes the blocks."""
    return SdpaOverrideMask.wrap(tree_mask(end), partial(_attend, tree_to_blocks(end)))


@torch.compiler.disable  # within compiled layers: else they are compiled anew for other blocks
def _attend(
    blocks: Sequence[Block], query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu")
        query, key, value = (each.to(half) for each in (query, key, value))
    apart = any(each.stride(-1) != 1 for each in (query, key, value))  # which the kernel would read as if it were 1
    if apart or not query.shape == key.shape == value.shape or options.get("dropout_p"):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    made: Tensor = _BlockwiseAttention.apply(query, key, value, blocks, options.get("scale"))
    return made


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "rows heads columns dim"],
        key: Float[Tensor, "rows heads columns dim"],
        value: Float[Tensor, "rows heads columns dim"],
        blocks: Sequence[Block],
        scale: float | None,
    ) -> Float[Tensor, "rows heads columns dim"]:
        exact = torch.promote_types(query.dtype, torch.float32)  # blocks are joined in it
        out = value.to(exact, copy=True)  # what sees itself alone is its own value
        sums = out.new_zeros(out.shape[:3])  # their logarithms
        for block in blocks:
            states = block.query_view(query), block.key_view(key), block.key_view(value)
            made, added = _attention(*states, 0.0, block.causal, scale=scale)
            so_far, total = block.query_view(out), block.query_view(sums)
            if block.causal:
                so_far.copy_(made)
                total.copy_(added)
            else:
                joined = torch.logaddexp(total, added)
                so_far.mul_((total - joined).exp_()[..., None]).addcmul_(made, (added - joined).exp_()[..., None])
                total.copy_(joined)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        exact, [grad] = sums.dtype, grads
        of_query, of_key = torch.zeros_like(query, dtype=exact), torch.zeros_like(key, dtype=exact)
        of_value = grad.to(exact, copy=True)
        for block in ctx.blocks:
            states = block.query_view(grad), block.query_view(query), block.key_view(key), block.key_view(value), block.query_view(out)
            made = _attention_backward(*states, block.query_view(sums), 0.0, block.causal, scale=ctx.scale)
            parts = block.query_view(of_query), block.key_view(of_key), block.key_view(of_value)
            for part, own in zip(parts, made, strict=True):
                part.copy_(own) if block.causal else part.add_(own)
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), None, None
