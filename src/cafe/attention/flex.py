"""Attention over trees by FlexAttention, which skips the blocks of its mask that are masked throughout."""

from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers.integrations.flex_attention import compile_friendly_flex_attention

from cafe.attention.masks import flex_tree_mask


class FlexTree:
    """Holds the mask of some rows of trees in FlexAttention's form.

    Args:
        subtree_end: one past the last token below each token.
    """

    def __init__(self, subtree_end: Int64[Tensor, "rows columns"]) -> None:
        self.block_mask = flex_tree_mask(subtree_end)

    def attend(
        self,
        query: Float[Tensor, "rows heads columns dim"],
        key: Float[Tensor, "rows key_heads columns dim"],
        value: Float[Tensor, "rows key_heads columns dim"],
        scale: float | None,
    ) -> Float[Tensor, "rows columns heads dim"]:
        """Compute attention; keys and values are not repeated for grouped queries."""
        output = compile_friendly_flex_attention(
            query,
            key,
            value,
            training=torch.is_grad_enabled(),
            block_mask=self.block_mask,
            scale=scale,
            enable_gqa=True,
        )
        return cast(Tensor, output).transpose(1, 2).contiguous()
