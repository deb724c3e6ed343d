"""`cafe_tree`: an attention implementation for transformers that receives trees as an argument of the forward pass.

Attention layers pass the keyword arguments of the model's forward on to the attention implementation. Given a `tree`,
it computes attention along it; without one it is transformers' SDPA, as for generation.
"""

from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cafe.attention.masks import tree_mask

CAFE_TREE = "cafe_tree"
CAFE_TREE_FLEX = "cafe_tree_flex"  # the same, where rows are laid out for FlexAttention
FLEX_IMPLEMENTATIONS = ("flex_attention", CAFE_TREE_FLEX)  # are compiled for each shape


@runtime_checkable
class TreeAttention(Protocol):
    """Computes attention along the trees of some rows: `Paths`, `Blocks`, `FlexTree`, or `QuerySubset`."""

    def attend(
        self,
        query: Float[Tensor, "rows heads columns dim"],
        key: Float[Tensor, "rows key_heads columns dim"],
        value: Float[Tensor, "rows key_heads columns dim"],
        scale: float | None,
    ) -> Float[Tensor, "rows columns heads dim"]:
        """Compute attention."""


def attend(
    module: nn.Module,
    query: Float[Tensor, "rows heads queries dim"],
    key: Float[Tensor, "rows key_heads keys dim"],
    value: Float[Tensor, "rows key_heads keys dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: TreeAttention | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "rows queries heads dim"], None]:
    """Compute attention along trees, or by SDPA where there are none.

    Args:
        module: the attention layer.
        query, key, value: its states.
        attention_mask: that of SDPA; with a tree, its `subtree_end` with two dimensions between rows and columns.
        scaling: of the scores; by default one over the root of `dim`.
        dropout: the share of attention weights that are dropped.
        tree: what computes it; None for SDPA.
        kwargs: further arguments of SDPA.
    """
    if tree is not None and dropout:
        # No kernel for trees drops weights.
        tree, attention_mask = None, tree_mask(cast(Tensor, attention_mask)[:, 0, :, 0])
    if tree is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output, None
    # Autocast casts SDPA's arguments; what replaces it has to do the same.
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return tree.attend(query, key, value, scaling), None


for _name in (CAFE_TREE, CAFE_TREE_FLEX):
    AttentionInterface.register(_name, attend)
    AttentionMaskInterface.register(_name, sdpa_mask)  # otherwise, padding would be attended to


def tree_implementation(attention: str) -> str:
    """Return the implementation that computes trees as an attention implementation of transformers would, or itself."""
    return {"sdpa": CAFE_TREE, "flex_attention": CAFE_TREE_FLEX}.get(attention, attention)


def use_tree_attention(lvlm: PreTrainedModel, attention: str = "sdpa") -> None:
    """Replace SDPA in a model's language model by `attend`, as FlexAttention where that is asked for.

    Language models that use another implementation, or do not look theirs up by name, stay as they are.
    """
    decoder: Any = lvlm.get_decoder()
    if lvlm.config.get_text_config()._attn_implementation != "sdpa" or not decoder._can_set_attn_implementation():
        return
    decoder.set_attn_implementation(tree_implementation(attention))
