"""Blockwise attention over long rows of trees on a CPU: only what is not masked is computed.

Under a dense mask, every token of a row is computed with every other, and most of it is masked. But the mask of a tree
consists of few blocks. A chain, tokens that follow each other both in the row and in the tree, is causal within itself,
and the kernel skips half of that. All else a token attends to is the beginnings of chains from which its own chain
branches off, and all tokens that branch off at the same place attend to the same beginning, unmasked. So each block is
one call of PyTorch's kernel on views. Where a token is in several blocks, their results are merged as FlashAttention
merges its own, by their logsumexp (Dao et al., arXiv 2205.14135). On a GPU, FlexAttention does this.
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

MIN_BLOCKWISE_TOKENS = 768  # row length from which the calls save more than they cost: `benchmarks/tree_attention.py`

_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Block:
    """Hold one unmasked block of a row: a chain with itself, causally, or what branches off with a chain's beginning.

    Attributes:
        row: the row.
        queries: the columns of the tokens that attend.
        keys: the columns of the tokens that they attend to; the same for a chain.
    """

    row: int
    queries: slice
    keys: slice

    @property
    def causal(self) -> bool:
        """Tell whether the block is a chain with itself."""
        return self.queries == self.keys

    def query_view(self, states: Shaped[Tensor, "rows heads columns *dim"]) -> Shaped[Tensor, "1 heads queries *dim"]:
        """Return a view of the states of the queries."""
        return states[self.row : self.row + 1, :, self.queries]

    def key_view(self, states: Shaped[Tensor, "rows heads columns *dim"]) -> Shaped[Tensor, "1 heads keys *dim"]:
        """Return a view of the states of the keys."""
        return states[self.row : self.row + 1, :, self.keys]


def tree_to_blocks(subtree_end: Int64[Tensor, "rows columns"]) -> list[Block]:
    """Split the mask of trees into blocks; in each row, the chains come before the other blocks.

    Tokens that attend to themselves alone, as padding does, are in no block.
    """
    blocks: list[Block] = []
    for row, ends in enumerate(subtree_end.tolist()):
        chains = list(_chains(ends))
        blocks += [Block(row, chain, chain) for chain in chains]
        for chain in chains:
            blocks += [Block(row, queries, keys) for queries, keys in _branches(ends, chain)]
    return blocks


def _chains(ends: Sequence[int]) -> Iterator[slice]:
    """Iterate over the chains of a row, without single tokens that attend to themselves alone."""
    # A token begins a chain where it is not below the token before it.
    starts = [0, *(column for column in range(1, len(ends)) if ends[column - 1] <= column)]
    # Padding gives chains of one token. So does a branch of one token, but that lies below another chain, to whose
    # tokens it attends.
    furthest_end = 0  # of the chains so far: tokens before it are below one of them
    for start, stop in zip(starts, [*starts[1:], len(ends)], strict=True):
        if stop > start + 1 or furthest_end > start:
            yield slice(start, stop)
        furthest_end = max(furthest_end, ends[start])


def _branches(ends: Sequence[int], chain: slice) -> Iterator[tuple[slice, slice]]:
    """Iterate over what branches off a chain: the columns of its tokens, and the chain's beginning they attend to."""
    # From the last token of the chain back: each token whose subtree ends later adds the tokens in between.
    stop = chain.stop
    for column in reversed(range(chain.start, chain.stop)):
        if ends[column] > stop:
            yield slice(stop, ends[column]), slice(chain.start, column + 1)
            stop = ends[column]


def blockwise_mask(subtree_end: Int64[Tensor, "rows columns"]) -> SdpaOverrideMask:
    """Make `tree_mask` of rows on a CPU, under which SDPA computes the unmasked blocks only."""
    return SdpaOverrideMask.wrap(tree_mask(subtree_end), partial(_blockwise_sdpa, tree_to_blocks(subtree_end)))


@torch.compiler.disable  # in compiled layers, which would otherwise be compiled again for every list of blocks
def _blockwise_sdpa(
    blocks: Sequence[Block], query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any
) -> Tensor:
    """Compute `scaled_dot_product_attention` block by block, where the kernel can."""
    # `scaled_dot_product_attention` is cast by autocast; what replaces it has to do the same.
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not _takes_blocks(query, key, value) or options.get("dropout_p"):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    output: Tensor = _BlockwiseAttention.apply(query, key, value, blocks, options.get("scale"))
    return output


def _takes_blocks(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether the kernel can be called on views of these states."""
    # Fewer heads of keys than of queries, or other tokens, are left to PyTorch's own function.
    if not query.shape == key.shape == value.shape:
        return False
    return query.stride(-1) == key.stride(-1) == value.stride(-1) == 1  # the kernel does not look at this stride


class _BlockwiseAttention(torch.autograd.Function):
    """Compute attention as the sum over blocks, each by PyTorch's kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "rows heads columns dim"],
        key: Float[Tensor, "rows heads columns dim"],
        value: Float[Tensor, "rows heads columns dim"],
        blocks: Sequence[Block],
        scale: float | None,
    ) -> Float[Tensor, "rows heads columns dim"]:
        """Compute the output of each block and merge them."""
        merge_dtype = torch.promote_types(query.dtype, torch.float32)
        output = value.to(merge_dtype, copy=True)  # a token that attends to itself alone gives its own value
        logsumexp = output.new_zeros(output.shape[:3])
        for block in blocks:
            states = block.query_view(query), block.key_view(key), block.key_view(value)
            block_output, block_logsumexp = _flash_attention(*states, 0.0, block.causal, scale=scale)
            output_view, logsumexp_view = block.query_view(output), block.query_view(logsumexp)
            if block.causal:  # the first block of its queries
                output_view.copy_(block_output)
                logsumexp_view.copy_(block_logsumexp)
                continue
            # Each output is a mean under its own softmax: weigh it by its share of the common denominator.
            total = torch.logaddexp(logsumexp_view, block_logsumexp)
            old_weight = (logsumexp_view - total).exp_()[..., None]
            block_weight = (block_logsumexp - total).exp_()[..., None]
            output_view.mul_(old_weight).addcmul_(block_output, block_weight)
            logsumexp_view.copy_(total)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.blocks, ctx.scale = blocks, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Sum the gradients of the blocks."""
        query, key, value, output, logsumexp = ctx.saved_tensors
        [grad_output] = grads
        grad_query = torch.zeros_like(query, dtype=logsumexp.dtype)
        grad_key = torch.zeros_like(key, dtype=logsumexp.dtype)
        grad_value = grad_output.to(logsumexp.dtype, copy=True)  # of a token that attends to itself alone
        for block in ctx.blocks:
            # With the merged output and logsumexp, the kernel gives the block's part of the whole gradient.
            block_grads = _flash_attention_backward(
                block.query_view(grad_output),
                block.query_view(query),
                block.key_view(key),
                block.key_view(value),
                block.query_view(output),
                block.query_view(logsumexp),
                0.0,
                block.causal,
                scale=ctx.scale,
            )
            views = block.query_view(grad_query), block.key_view(grad_key), block.key_view(grad_value)
            for view, block_grad in zip(views, block_grads, strict=True):
                if block.causal:
                    view.copy_(block_grad)
                else:
                    view.add_(block_grad)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None
