"""Attention over trees on a CPU, block by block: only what is not masked is computed.

The mask of a tree consists of few blocks. A chain is causal within itself, and PyTorch's kernel skips half of that. All
else a token attends to is the beginnings of chains from which its own chain branches off, and all tokens that branch
off at the same place attend to the same beginning, unmasked. So each block is one call of the kernel on views. Where a
token is in several blocks, their results are merged as FlashAttention merges its own, by their logsumexp (Dao et al.,
arXiv 2205.14135).

All calls of a layer are one operator to PyTorch, which takes the blocks as a tensor: `torch.compile` makes one graph
for all lists of blocks.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cafe.attention.chains import iter_branches, iter_chains, read_spans

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

    @property
    def num_pairs(self) -> int:
        """Count the pairs of a query and a key that is not masked."""
        num_queries, num_keys = (each.stop - each.start for each in (self.queries, self.keys))
        return num_queries * (num_queries + 1) // 2 if self.causal else num_queries * num_keys

    def query_view(self, states: Shaped[Tensor, "rows heads columns *dim"]) -> Shaped[Tensor, "1 heads queries *dim"]:
        """Return a view of the states of the queries."""
        return _view(states, self.row, self.queries)

    def key_view(self, states: Shaped[Tensor, "rows heads columns *dim"]) -> Shaped[Tensor, "1 heads keys *dim"]:
        """Return a view of the states of the keys."""
        return _view(states, self.row, self.keys)


def _view(states: Tensor, row: int, columns: slice) -> Tensor:
    """Return some columns of a row; as there are many blocks, in as few operations as possible."""
    if len(states) > 1:
        states = states.narrow(0, row, 1)
    return states.narrow(2, columns.start, columns.stop - columns.start)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Hold the blocks of rows of trees; the causal ones of a row come before the others.

    Attributes:
        bounds: for each block its row, the first and last column of its queries, and those of its keys, with the last
            columns exclusive.
    """

    bounds: Int64[Tensor, "blocks 5"]

    def attend(
        self,
        query: Float[Tensor, "rows heads columns dim"],
        key: Float[Tensor, "rows key_heads columns dim"],
        value: Float[Tensor, "rows key_heads columns dim"],
        scale: float | None,
    ) -> Float[Tensor, "rows columns heads dim"]:
        """Compute attention; the output of tokens that are no queries is zero."""
        output, _ = torch.ops.cafe.attend_blocks(query, key, value, self.bounds, scale)
        return cast(Tensor, output)

    def to(self, device: torch.device) -> "Blocks":
        """Return the blocks as they are: they are read on the CPU."""
        return self

    def pin_memory(self) -> "Blocks":
        """Return the blocks as they are: they are read on the CPU."""
        return self


def tree_to_blocks(subtree_end: Int64[Tensor, "rows columns"]) -> Blocks:
    """Make the blocks of all tokens."""
    blocks: list[Block] = []
    for row, ends in enumerate(subtree_end.tolist()):
        chains = list(iter_chains(ends))
        blocks += [Block(row, chain, chain) for chain in chains]
        for chain in chains:
            blocks += [Block(row, queries, keys) for queries, keys in iter_branches(ends, chain)]
    return _join(blocks)


def read_blocks(subtree_end: Int64[Tensor, "rows columns"], read: Bool[Tensor, "rows columns"]) -> Blocks:
    """Make the blocks for the last layer, whose output is read for some tokens only.

    The queries of a chain reach from the first token that is read to the last.
    """
    blocks: list[Block] = []
    for row, (ends, is_read) in enumerate(zip(subtree_end.tolist(), read, strict=True)):
        spans = read_spans(ends, is_read.nonzero()[:, 0].tolist())
        starts = [chain.start for chain, _ in spans]
        blocks += [Block(row, span, span) for _, span in spans]
        # The tokens of a chain before its span are all attended to.
        blocks += [
            Block(row, span, slice(chain.start, span.start)) for chain, span in spans if chain.start < span.start
        ]
        for chain in iter_chains(ends):
            for queries, keys in iter_branches(ends, chain):
                # A chain attends as a whole to what it branches off from.
                first, stop = bisect_left(starts, queries.start), bisect_left(starts, queries.stop)
                blocks += [Block(row, span, keys) for _, span in spans[first:stop]]
    return _join(blocks)


def _join(blocks: Sequence[Block]) -> Blocks:
    """Write blocks as a tensor."""
    bounds = [(each.row, each.queries.start, each.queries.stop, each.keys.start, each.keys.stop) for each in blocks]
    return Blocks(torch.tensor(bounds, dtype=torch.long).view(-1, 5))


def iter_blocks(bounds: Int64[Tensor, "blocks 5"]) -> Iterator[Block]:
    """Iterate over the blocks of a tensor."""
    for row, query_start, query_stop, key_start, key_stop in bounds.tolist():
        yield Block(row, slice(query_start, query_stop), slice(key_start, key_stop))


def _to_kernel_input(states: Shaped[Tensor, "*sizes"]) -> Shaped[Tensor, "*sizes"]:
    """Return states as the kernel reads them."""
    # Results are merged in float32 at least, in which the kernel's backward pass over small blocks is faster, too.
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    # The kernel does not look at the last stride, and would read the wrong numbers.
    return states if states.stride(-1) == 1 else states.contiguous()


@torch.library.custom_op(
    "cafe::attend_blocks",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor bounds, float? scale) -> (Tensor, Tensor)",
)
def _attend_blocks(
    query: Float[Tensor, "rows heads columns dim"],
    key: Float[Tensor, "rows key_heads columns dim"],
    value: Float[Tensor, "rows key_heads columns dim"],
    bounds: Int64[Tensor, "blocks 5"],
    scale: float | None,
) -> tuple[Float[Tensor, "rows columns heads dim"], Float[Tensor, "rows heads columns"]]:
    """Compute the output of each block and merge them; return the output and its logsumexp."""
    dtype = query.dtype
    query, key, value = map(_to_kernel_input, (query, key, value))
    # In the layout that the model's output projection reads.
    rows, heads, columns, dim = query.shape
    merged = query.new_zeros(rows, columns, heads, dim)
    output, logsumexp = merged.transpose(1, 2), merged.new_zeros(rows, heads, columns)
    for block in iter_blocks(bounds):
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
    return merged.to(dtype), logsumexp


@torch.library.custom_op(
    "cafe::attend_blocks_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, "
    "Tensor bounds, float? scale) -> (Tensor, Tensor, Tensor)",
)
def _attend_blocks_backward(
    grad_output: Float[Tensor, "rows columns heads dim"],
    query: Float[Tensor, "rows heads columns dim"],
    key: Float[Tensor, "rows key_heads columns dim"],
    value: Float[Tensor, "rows key_heads columns dim"],
    output: Float[Tensor, "rows columns heads dim"],
    logsumexp: Float[Tensor, "rows heads columns"],
    bounds: Int64[Tensor, "blocks 5"],
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the gradients of the blocks."""
    dtype = query.dtype
    query, key, value = map(_to_kernel_input, (query, key, value))
    grad_output, output = (_to_kernel_input(states).transpose(1, 2) for states in (grad_output, output))
    grads = [logsumexp.new_zeros(states.shape) for states in (query, key, value)]
    for block in iter_blocks(bounds):
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
            scale=scale,
        )
        # A token is a query of several blocks and a key of many, of which the causal one comes first.
        views = block.query_view(grads[0]), block.key_view(grads[1]), block.key_view(grads[2])
        for view, block_grad in zip(views, block_grads, strict=True):
            if block.causal:
                view.copy_(block_grad)
            else:
                view.add_(block_grad)
    grad_query, grad_key, grad_value = (grad.to(dtype) for grad in grads)
    return grad_query, grad_key, grad_value


@_attend_blocks.register_fake
def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return tensors of the shapes that the operator returns."""
    rows, heads, columns, dim = query.shape
    merge_dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(rows, columns, heads, dim), query.new_empty(rows, heads, columns, dtype=merge_dtype)


@_attend_blocks_backward.register_fake
def _fake_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors of the shapes that the operator returns."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward pass reads."""
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    # The logsumexp is for the backward pass alone.
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_output: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the states."""
    query, key, value, bounds, output, logsumexp = ctx.saved_tensors
    grads = torch.ops.cafe.attend_blocks_backward(grad_output, query, key, value, output, logsumexp, bounds, ctx.scale)
    return (*grads, None, None)


_attend_blocks.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.cafe.attend_blocks, get_raw=True)
def _forward_flops(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *rest: Any, **kwargs: Any) -> int:
    """Count the FLOPs of two products of matrices for the pairs that are computed."""
    return 4 * query.shape[1] * query.shape[3] * _num_pairs(bounds)


@register_flop_formula(torch.ops.cafe.attend_blocks_backward, get_raw=True)
def _backward_flops(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, bounds: Tensor,
    *rest: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Count the FLOPs of four products of matrices, without the scores, which are computed again."""
    return 8 * query.shape[1] * query.shape[3] * _num_pairs(bounds)


def _num_pairs(bounds: Int64[Tensor, "blocks 5"]) -> int:
    """Count the pairs of queries and keys of all blocks."""
    return sum(block.num_pairs for block in iter_blocks(bounds))
