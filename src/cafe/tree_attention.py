"""Attention over long rows of trees on a CPU: a call for each path of a row, not one over all that is masked.

Dense, a row of trees computes every token with every other and throws most of it away. Along a path, tokens that follow
each other in the row and in the tree, attention is causal, and the kernel skips half of that; beside its own tokens a
path sees the same ancestors everywhere, and nothing else. On a GPU FlexAttention does this.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from cafe.masks import OwnWay
from cafe.packing import tree_mask

LONG = 768  # columns from which on the calls save more than they cost: `benchmarks/tree_attention.py`

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Path:
    """Tokens of a row each of which is the parent of the next.

    Attributes:
        row, start, stop: where they are.
        sees: the columns of their ancestors, and their own.
        bias: what is added to the logits of its tokens with these; None without ancestors, where attention is causal.
    """

    row: int
    start: int
    stop: int
    sees: Int64[Tensor, " seen"]
    bias: Float[Tensor, "own seen"] | None

    def own(self, states: Float[Tensor, "rows heads columns dim"]) -> Float[Tensor, "1 heads own dim"]:
        """The states of its tokens."""
        return states[self.row : self.row + 1, :, self.start : self.stop]

    def seen(self, states: Float[Tensor, "rows heads columns dim"]) -> Float[Tensor, "1 heads seen dim"]:
        """The states of what its tokens see."""
        if self.bias is None:
            return self.own(states)
        return states[self.row : self.row + 1].index_select(2, self.sees)

    def add(self, sums: Float[Tensor, "rows heads columns dim"], part: Float[Tensor, "1 heads seen dim"]) -> None:
        """Adds to what its tokens see."""
        if self.bias is None:
            self.own(sums).add_(part)
        else:
            sums[self.row].index_add_(1, self.sees, part[0])

    def options(self, dtype: torch.dtype, scale: float | None) -> dict[str, Any]:
        """Of the kernel."""
        return {"attn_mask": None if self.bias is None else self.bias.to(dtype), "scale": scale}


def paths_of(end: Int64[Tensor, "rows columns"]) -> Iterator[Path]:
    """The paths of some rows: a token begins one where the token before it is not its parent.

    Tokens that see themselves alone, as padding does, are left out.
    """
    for row, ends in enumerate(end):
        columns = torch.arange(len(ends))
        starts = [0, *(1 + (ends[:-1] <= columns[1:]).nonzero()[:, 0]).tolist()]
        for start, stop in zip(starts, [*starts[1:], len(ends)], strict=True):
            ancestors = (ends[:start] > start).nonzero()[:, 0]
            if not len(ancestors) and stop == start + 1:
                continue
            sees = torch.cat([ancestors, columns[start:stop]])
            hidden = torch.ones(stop - start, len(sees), dtype=torch.bool).triu(len(ancestors) + 1)
            bias = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            yield Path(row, start, stop, sees, bias if len(ancestors) else None)


def by_paths(end: Int64[Tensor, "rows columns"]) -> OwnWay:
    """`tree_mask` of rows on a CPU, of which PyTorch's attention takes the paths."""
    return OwnWay.of(tree_mask(end), partial(_attend, list(paths_of(end))))


@torch.compiler.disable  # within compiled layers: else they are compiled anew for other paths
def _attend(
    paths: Sequence[Path], query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu")
        query, key, value = (each.to(half) for each in (query, key, value))
    if not query.shape == key.shape == value.shape or options.get("dropout_p"):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    made: Tensor = _ByPaths.apply(query, key, value, paths, options.get("scale"))
    return made


class _ByPaths(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, paths: Sequence[Path], scale: float | None
    ) -> Tensor:
        out = value.clone()  # what sees itself alone is its own value
        sums = []
        for path in paths:
            states = path.own(query), path.seen(key), path.seen(value)
            made, total = _attention(*states, 0.0, path.bias is None, **path.options(query.dtype, scale))
            path.own(out).copy_(made)
            sums.append(total)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.paths, ctx.scale = paths, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *sums = ctx.saved_tensors
        [grad] = grads
        grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), grad.clone()
        for path in ctx.paths:
            path.own(grad_value).zero_()
        for path, total in zip(ctx.paths, sums, strict=True):
            states = path.own(grad), path.own(query), path.seen(key), path.seen(value), path.own(out), total
            of_query, of_key, of_value = _attention_backward(
                *states, 0.0, path.bias is None, **path.options(query.dtype, ctx.scale)
            )
            path.own(grad_query).copy_(of_query)
            path.add(grad_key, of_key)
            path.add(grad_value, of_value)
        return grad_query, grad_key, grad_value, None, None
