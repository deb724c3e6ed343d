"""The masks under which tokens of a packed row attend to their own ancestors only."""

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

FLEX_BLOCK_SIZE = 128  # the side of FlexAttention's blocks, in tokens


def tree_mask(subtree_end: Int64[Tensor, "rows columns"]) -> Bool[Tensor, "rows 1 columns columns"]:
    """Make the dense mask: True where the query (second-last dimension) attends to the key (last dimension)."""
    column = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    is_causal = column[None, :] <= column[:, None]
    is_below = column[:, None] < subtree_end[:, None, :]
    return (is_causal & is_below)[:, None]


def dense_mask(
    subtree_end: Int64[Tensor, "rows columns"], dtype: torch.dtype, implementation: str
) -> Float[Tensor, "rows 1 columns columns"]:
    """Make the mask of numbers that are added to the scores.

    Args:
        subtree_end: one past the last token below each token.
        dtype: of the queries.
        implementation: the attention implementation; "eager" takes no infinity.
    """
    attends = tree_mask(subtree_end)
    masked = torch.finfo(dtype).min if implementation == "eager" else float("-inf")
    # A mask whose rows begin at multiples of eight is used on a GPU as it is. From any other, every layer would make
    # such a copy and keep it for its backward pass. They are always longer than the columns, because layers would be
    # compiled once more where they are not.
    columns = subtree_end.shape[1]
    aligned = columns + 8 - columns % 8
    bias = torch.zeros(*attends.shape[:3], aligned, dtype=dtype, device=subtree_end.device)
    return bias[..., :columns].masked_fill_(~attends, masked)


def flex_tree_mask(subtree_end: Int64[Tensor, "rows columns"]) -> BlockMask:
    """Make the same mask for FlexAttention, which skips the blocks of 128 x 128 tokens that are masked throughout.

    The smallest and largest `subtree_end` among the keys of a block determine what it holds, so the dense mask, which
    grows with the square of the row, is never made.
    """

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Tell whether a query attends to a key, as `tree_mask` does."""
        return (key <= query) & (query < subtree_end[row, key])

    def attends_in_only_row(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Tell the same in a batch of one row."""
        return (key <= query) & (query < subtree_end[0, key])

    rows, columns = subtree_end.shape
    padded = torch.nn.functional.pad(subtree_end, (0, -columns % FLEX_BLOCK_SIZE))
    min_end, max_end = padded.unflatten(1, (-1, FLEX_BLOCK_SIZE)).aminmax(dim=2)
    min_end, max_end = min_end[:, None, None, :], max_end[:, None, None, :]

    # Dimensions: rows, heads, blocks of queries, blocks of keys. A block has something to attend to if its first query
    # is below some key. It is full if it lies before the diagonal and its last query is below every key.
    key_block = torch.arange(max_end.shape[-1], device=subtree_end.device)
    query_block = key_block[:, None]
    first_query = FLEX_BLOCK_SIZE * query_block
    is_used = (key_block <= query_block) & (first_query < max_end)
    is_full = (key_block < query_block) & (first_query + FLEX_BLOCK_SIZE <= min_end)
    return BlockMask.from_kv_blocks(
        *_kv_block_indices(is_used & ~is_full),
        *_kv_block_indices(is_full),
        BLOCK_SIZE=FLEX_BLOCK_SIZE,
        mask_mod=attends_in_only_row if rows == 1 else attends,
        seq_lengths=(columns, columns),
    )


def _kv_block_indices(
    blocks: Bool[Tensor, "rows 1 queries keys"],
) -> tuple[Int32[Tensor, "rows 1 queries"], Int32[Tensor, "rows 1 queries keys"]]:
    """Return, for each block of queries, the number of selected blocks of keys, and all their indices, selected first.

    The sort is stable, so the selected blocks keep their order.
    """
    counts = blocks.sum(-1, dtype=torch.int32)
    return counts, blocks.int().argsort(dim=-1, descending=True, stable=True).int()
