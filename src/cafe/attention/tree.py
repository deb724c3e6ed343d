"""A forward pass under tree attention."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig, PreTrainedModel

from cafe.attention.blockwise import MIN_BLOCKWISE_TOKENS, blockwise_mask
from cafe.attention.last_layer import restrict_last_layer
from cafe.attention.masks import flex_tree_mask, tree_mask


@contextmanager
def tree_attention(
    lvlm: PreTrainedModel, subtree_end: Int64[Tensor, "rows columns"] | None, *read_index: Int64[Tensor, "_tokens 2"]
) -> Iterator[dict[str, Tensor | BlockMask]]:
    """Let a model attend along trees, and compute its last layer only for the tokens that are read.

    Within the context, the last hidden states of all other tokens are meaningless.

    Args:
        lvlm: the model.
        subtree_end: one past the last token below each token, as in `cafe.packing`; None where every row is an ordinary
            sequence, for which the model makes its own mask.
        read_index: the (row, column) of the tokens whose last hidden states are read.

    Yields:
        The attention mask by name, to be passed to the model; empty without `subtree_end`.
    """
    inputs: dict[str, Tensor | BlockMask] = {}
    if subtree_end is not None:
        device = lvlm.device
        # SDPA takes a mask of numbers in the dtype of the queries, which is autocast's where it is enabled.
        dtype = lvlm.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        end = subtree_end.to(device, non_blocking=True)
        inputs["attention_mask"] = attention_mask(end, lvlm.config.get_text_config(), dtype)
    with restrict_last_layer(lvlm, *read_index):
        yield inputs


def attention_mask(
    subtree_end: Int64[Tensor, "rows columns"], config: PreTrainedConfig, dtype: torch.dtype = torch.float32
) -> Tensor | BlockMask:
    """Make the mask of trees in the form that the model's attention implementation takes.

    Args:
        subtree_end: one past the last token below each token.
        config: the config of the language model.
        dtype: the dtype of a mask of numbers.
    """
    implementation, columns = config._attn_implementation, subtree_end.shape[1]
    if implementation == "flex_attention":
        return flex_tree_mask(subtree_end)
    is_long_on_cpu = subtree_end.device.type == "cpu" and columns >= MIN_BLOCKWISE_TOKENS
    if implementation == "sdpa" and is_long_on_cpu:
        return blockwise_mask(subtree_end)
    # A mask of numbers whose rows begin at multiples of eight is used on a GPU as it is. From any other mask, every
    # layer would make such a copy and keep it for its backward pass.
    attends = tree_mask(subtree_end)
    masked = torch.finfo(dtype).min if implementation == "eager" else float("-inf")
    aligned = -(-columns // 8) * 8  # rounded up
    bias = torch.zeros(*attends.shape[:3], aligned, dtype=dtype, device=subtree_end.device)
    return bias[..., :columns].masked_fill_(~attends, masked)
