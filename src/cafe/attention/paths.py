"""Attention over trees by variable-length causal attention, as FlashAttention computes it on a GPU.

Each chain of a row is one sequence of queries. Its keys are its ancestors, which are gathered, and its own tokens. The
queries are the last of the keys, so causal attention aligned at the bottom right computes exactly the pairs that the
tree mask leaves: there is no mask, nothing to merge, and keys and values of grouped queries are not repeated. The
length of a row costs nothing, so all trees can go into one row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from cafe.attention.chains import iter_ancestors, read_spans

MAX_HEAD_DIM = 256  # of the kernel, which takes multiples of 8
MIN_CAPABILITY = (8, 0)  # of the GPU
HALF_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Paths:
    """Hold sequences of queries and the keys that each of them attends to, causally.

    Attributes:
        queries: the tokens that attend, as row * columns + column; None for all tokens in order.
        keys: the tokens attended to, for one sequence after the other.
        query_starts, key_starts: where each sequence begins among the queries and among the keys, and the end.
        longest_query, longest_key: the length of the longest sequence, and at least 2.
        fused: whether PyTorch's kernel may be used where states are in 16 bits on a GPU.
    """

    queries: Int64[Tensor, " queries"] | None
    keys: Int64[Tensor, " keys"]
    query_starts: Int32[Tensor, " starts"]
    key_starts: Int32[Tensor, " starts"]
    longest_query: int
    longest_key: int
    fused: bool = True

    def attend(
        self,
        query: Float[Tensor, "rows heads columns dim"],
        key: Float[Tensor, "rows key_heads columns dim"],
        value: Float[Tensor, "rows key_heads columns dim"],
        scale: float | None,
    ) -> Float[Tensor, "rows columns heads dim"]:
        """Compute attention; the output of tokens that are no queries is zero."""
        rows, _, columns, _ = query.shape
        # The kernel takes (tokens, heads, dim); rows are laid end to end without a copy where there is one.
        flat_query = _flatten(query)
        if self.queries is not None:
            flat_query = flat_query.index_select(0, self.queries)
        output = causal_attention(flat_query, _gather(key, self.keys), _gather(value, self.keys), self, scale)
        if self.queries is not None:
            output = output.new_zeros(rows * columns, *output.shape[1:]).index_copy(0, self.queries, output)
        return output.unflatten(0, (rows, columns))

    def to(self, device: torch.device) -> "Paths":
        """Copy all tensors to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Paths":
        """Copy all tensors to pinned memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, copy: Callable[[Tensor], Tensor]) -> "Paths":
        """Copy all tensors."""
        return replace(
            self,
            queries=None if self.queries is None else copy(self.queries),
            keys=copy(self.keys),
            query_starts=copy(self.query_starts),
            key_starts=copy(self.key_starts),
        )


def _flatten(states: Float[Tensor, "rows heads columns dim"]) -> Float[Tensor, "tokens heads dim"]:
    """Lay the rows end to end."""
    return states.transpose(1, 2).flatten(0, 1)


def _gather(
    states: Float[Tensor, "rows heads columns dim"], tokens: Int64[Tensor, " keys"]
) -> Float[Tensor, "keys heads dim"]:
    """Gather the states of some tokens, of which there may be many copies."""
    # In float32, because the backward pass sums the gradients of the copies: a system prompt has one for each branch.
    exact = _flatten(states).to(torch.promote_types(states.dtype, torch.float32))
    return exact.index_select(0, tokens).to(states.dtype)


def tree_to_paths(subtree_end: Int64[Tensor, "rows columns"]) -> Paths:
    """Make the paths of all tokens."""
    columns = subtree_end.shape[1]
    query_lengths, keys = [], []
    for row, ends in enumerate(subtree_end.tolist()):
        # In the order of the row, so that queries need not be gathered.
        for chain, ancestors in iter_ancestors(ends):
            query_lengths.append(chain.stop - chain.start)
            keys.append(_tokens([*ancestors, chain]) + row * columns)
    return _make_paths(None, query_lengths, keys)


def read_paths(subtree_end: Int64[Tensor, "rows columns"], read: Bool[Tensor, "rows columns"]) -> Paths:
    """Make the paths for the last layer, whose output is read for some tokens only.

    The queries of a chain reach from the first token that is read to the last, which keeps them in sequence.
    """
    columns = subtree_end.shape[1]
    queries, query_lengths, keys = [np.empty(0, np.int64)], [], []
    for row, (ends, is_read) in enumerate(zip(subtree_end.tolist(), read, strict=True)):
        spans = {chain.start: span for chain, span in read_spans(ends, is_read.nonzero()[:, 0].tolist())}
        for chain, ancestors in iter_ancestors(ends):
            span = spans.get(chain.start)
            if span is None:
                continue
            # The last query is the last key: tokens of the chain after it are not attended to.
            queries.append(_tokens([span]) + row * columns)
            query_lengths.append(span.stop - span.start)
            keys.append(_tokens([*ancestors, slice(chain.start, span.stop)]) + row * columns)
    return _make_paths(np.concatenate(queries), query_lengths, keys)


def _tokens(columns: list[slice]) -> np.ndarray:
    """Return the columns of some slices, one after the other."""
    return np.concatenate([np.arange(each.start, each.stop) for each in columns])


def _make_paths(queries: np.ndarray | None, query_lengths: list[int], keys: list[np.ndarray]) -> Paths:
    """Join the sequences."""
    key_lengths = list(map(len, keys))
    # For sequences of one query, FlashAttention has another way, which its backward pass may not fit; and compiled
    # layers would be compiled anew for a length of 1.
    return Paths(
        queries=None if queries is None else torch.from_numpy(queries),
        keys=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *keys])),
        query_starts=_starts(query_lengths),
        key_starts=_starts(key_lengths),
        longest_query=max([2, *query_lengths]),
        longest_key=max([2, *key_lengths]),
    )


def _starts(lengths: list[int]) -> Int32[Tensor, " starts"]:
    """Return where each of some sequences begins, and the end of the last."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def has_varlen_kernel(device: torch.device | None, dtype: torch.dtype, head_dim: int) -> bool:
    """Tell whether PyTorch's variable-length FlashAttention runs on a device with such states.

    Args:
        device: the device; None for a recent GPU that is not here.
        dtype: of the states.
        head_dim: the size of a head.
    """
    if dtype not in HALF_PRECISION or head_dim > MAX_HEAD_DIM or head_dim % 8:
        return False
    if device is None:
        return True
    if device.type != "cuda" or torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def causal_attention(
    query: Float[Tensor, "queries heads dim"],
    key: Float[Tensor, "keys key_heads dim"],
    value: Float[Tensor, "keys key_heads dim"],
    paths: Paths,
    scale: float | None,
) -> Float[Tensor, "queries heads dim"]:
    """Compute causal attention within each sequence, whose queries are the last of its keys."""
    if paths.fused and query.is_cuda and query.dtype in HALF_PRECISION:
        starts, longest = (paths.query_starts, paths.key_starts), (paths.longest_query, paths.longest_key)
        dropout, is_causal, return_debug_mask = 0.0, True, False
        output, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *starts, *longest, dropout, is_causal, return_debug_mask, scale=scale
        )
        return cast(Tensor, output)
    return attend_one_by_one(query, key, value, paths, scale)


def attend_one_by_one(
    query: Float[Tensor, "queries heads dim"],
    key: Float[Tensor, "keys key_heads dim"],
    value: Float[Tensor, "keys key_heads dim"],
    paths: Paths,
    scale: float | None,
) -> Float[Tensor, "queries heads dim"]:
    """Compute `causal_attention` a sequence at a time: the reference, and what there is without a kernel."""
    outputs = []
    for queries, keys in zip(_slices(paths.query_starts), _slices(paths.key_starts), strict=True):
        num_queries, num_keys = queries.stop - queries.start, keys.stop - keys.start
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
        # The functional takes (batch, heads, tokens, dim).
        q, k, v = (each.transpose(0, 1)[None] for each in (query[queries], key[keys], value[keys]))
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def _slices(starts: Int32[Tensor, " starts"]) -> list[slice]:
    """Return the places of each sequence."""
    return [slice(start, stop) for start, stop in pairwise(starts.tolist())]
