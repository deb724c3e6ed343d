"""The masks under which tokens of a packed row see their own ancestors only."""

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

FLEX_BLOCK_SIZE = 128  # tokens a side of FlexAttention's blocks


def tree_mask(end: Int64[Tensor, "rows columns"]) -> Bool[Tensor, "rows 1 columns columns"]:
    """Who sees whom, densely: True where the second-last dimension's token may look at the last one's."""
    at = torch.arange(end.shape[1], device=end.device)
    return ((at[None, :] <= at[:, None]) & (at[:, None] < end[:, None, :]))[:, None]


def flex_tree_mask(end: Int64[Tensor, "rows columns"]) -> BlockMask:
    """The same for FlexAttention, which skips the blocks of 128 x 128 tokens that hold nothing to see.

    What a block holds follows from the smallest and largest `end` among its keys: no mask of all tokens is made.
    """

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[row, key])

    def sees_alone(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[0, key])

    rows, columns = end.shape
    blocks = torch.nn.functional.pad(end, (0, -columns % FLEX_BLOCK_SIZE)).unflatten(1, (-1, FLEX_BLOCK_SIZE))
    least, most = (found[:, None, None, :] for found in blocks.aminmax(dim=2))
    at = torch.arange(blocks.shape[1], device=end.device)
    first = FLEX_BLOCK_SIZE * at[:, None]  # query of each block
    some = (at <= at[:, None]) & (first < most)
    full = (at < at[:, None]) & (first + FLEX_BLOCK_SIZE <= least)
    return BlockMask.from_kv_blocks(
        *_kv_block_indices(some & ~full),
        *_kv_block_indices(full),
        BLOCK_SIZE=FLEX_BLOCK_SIZE,
        mask_mod=sees_alone if rows == 1 else sees,
        seq_lengths=(columns, columns),
    )


def _kv_block_indices(blocks: Bool[Tensor, "rows 1 queries keys"]) -> tuple[Tensor, Tensor]:
    """For each block of queries, how many blocks of keys are meant, and all blocks' numbers, these first."""
    return blocks.sum(-1, dtype=torch.int32), blocks.int().argsort(dim=-1, descending=True, stable=True).int()
