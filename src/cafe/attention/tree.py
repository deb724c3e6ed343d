"""The mask of trees, in the form that each attention implementation takes."""

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig

from cafe.attention.blockwise import MIN_BLOCKWISE_TOKENS, blockwise_mask
from cafe.attention.masks import flex_tree_mask, tree_mask


def attention_mask(
    end: Int64[Tensor, "rows columns"], config: PreTrainedConfig, dtype: torch.dtype = torch.float32
) -> Tensor | BlockMask:
    """The mask of trees, as the attention implementation takes it."""
    if config._attn_implementation == "flex_attention":
        return flex_tree_mask(end)
    if end.device.type == "cpu" and end.shape[1] >= MIN_BLOCKWISE_TOKENS and config._attn_implementation == "sdpa":
        return blockwise_mask(end)
    # As numbers, and rows of them at multiples of eight: else every layer on a GPU would make such numbers for itself,
    # and keep them for its backward pass.
    seen, columns = tree_mask(end), end.shape[1]
    hidden = torch.finfo(dtype).min if config._attn_implementation == "eager" else float("-inf")
    numbers = torch.zeros(*seen.shape[:3], -(-columns // 8) * 8, dtype=dtype, device=end.device)
    return numbers[..., :columns].masked_fill_(~seen, hidden)
