"""A forward pass under tree attention: what attention layers receive for the trees in their rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from cafe.attention.blockwise import Blocks, read_blocks, tree_to_blocks
from cafe.attention.flex import FlexTree
from cafe.attention.last_layer import restrict_last_layer
from cafe.attention.masks import dense_mask
from cafe.attention.paths import Paths, has_varlen_kernel, read_paths, tree_to_paths
from cafe.attention.registration import CAFE_TREE, CAFE_TREE_FLEX

# How attention over trees is computed: under a dense mask, by blocks on a CPU, by variable-length FlashAttention on a
# GPU, by FlexAttention.
Kernel = Literal["mask", "blocks", "paths", "flex"]


@dataclass(frozen=True, eq=False)
class Tree:
    """Hold the trees of some rows, prepared for a kernel.

    Attributes:
        subtree_end: one past the last token below each token, as in `cafe.packing`.
        kernel: the kernel.
        all_tokens: what attention layers take for "blocks" and "paths".
        read_tokens: the same for the last layer, of which the output of some tokens is read; None if none is read.
    """

    subtree_end: Int64[Tensor, "rows columns"]
    kernel: Kernel = "mask"
    all_tokens: Paths | Blocks | None = None
    read_tokens: Paths | Blocks | None = None

    def pin_memory(self) -> "Tree":
        """Copy all tensors to pinned memory."""
        return replace(
            self,
            subtree_end=self.subtree_end.pin_memory(),
            all_tokens=self.all_tokens and self.all_tokens.pin_memory(),
            read_tokens=self.read_tokens and self.read_tokens.pin_memory(),
        )


def make_tree(subtree_end: Int64[Tensor, "rows columns"], read_index: Int64[Tensor, "read 2"], kernel: Kernel) -> Tree:
    """Prepare trees for a kernel.

    Args:
        subtree_end: one past the last token below each token.
        read_index: the (row, column) of the tokens whose last hidden states are read.
        kernel: the kernel.
    """
    # The others make what they need on the device, from one number per token.
    if kernel not in ("paths", "blocks"):
        return Tree(subtree_end, kernel)

    read = torch.zeros_like(subtree_end, dtype=torch.bool)
    read[read_index[:, 0], read_index[:, 1]] = True
    make_all, make_read = (tree_to_paths, read_paths) if kernel == "paths" else (tree_to_blocks, read_blocks)
    return Tree(subtree_end, kernel, make_all(subtree_end), make_read(subtree_end, read) if len(read_index) else None)


def choose_kernel(config: PreTrainedConfig, device: torch.device | None, dtype: torch.dtype) -> Kernel:
    """Choose how a language model computes attention over trees.

    Args:
        config: the config of the language model.
        device: where it computes; None for a recent GPU that is not here.
        dtype: of its queries.
    """
    # Other implementations know nothing of trees, and no kernel for trees drops weights.
    if config._attn_implementation not in (CAFE_TREE, CAFE_TREE_FLEX):
        return "mask"
    if getattr(config, "attention_dropout", None):
        return "mask"
    if config._attn_implementation == CAFE_TREE_FLEX:
        return "flex"
    if device is not None and device.type == "cpu":
        return "blocks"
    return "paths" if has_varlen_kernel(device, dtype, _head_dim(config)) else "mask"


def _head_dim(config: PreTrainedConfig) -> int:
    """Return the size of an attention head of a language model."""
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim


@contextmanager
def tree_attention(
    lvlm: PreTrainedModel, tree: Tree | None, *read_index: Int64[Tensor, "_tokens 2"]
) -> Iterator[dict[str, Any]]:
    """Let a model attend along trees, and compute its last layer only for the tokens that are read.

    Within the context, the last hidden states of all other tokens are meaningless.

    Args:
        lvlm: the model.
        tree: the trees; None where every row is an ordinary sequence, for which the model makes its own mask.
        read_index: the (row, column) of the tokens whose last hidden states are read.

    Yields:
        Inputs by name, to be passed to the model; empty without trees.
    """
    inputs: dict[str, Any] = {}
    read_tokens = None
    if tree is not None:
        # The model may have been moved since the rows were laid out for a CPU.
        if tree.kernel == "blocks" and lvlm.device.type != "cpu":
            tree = make_tree(tree.subtree_end, torch.cat(read_index), "paths")
        inputs = _tree_inputs(lvlm, tree)
        if "tree" in inputs and tree.read_tokens is not None:
            read_tokens = _to_model(lvlm, tree.read_tokens)
    with restrict_last_layer(lvlm, *read_index, read_tokens=read_tokens):
        yield inputs


def _tree_inputs(lvlm: PreTrainedModel, tree: Tree) -> dict[str, Any]:
    """Return the attention mask and, for attention layers that know trees, the tree."""
    device, config = lvlm.device, lvlm.config.get_text_config()
    end = tree.subtree_end.to(device, non_blocking=True)
    if tree.kernel != "mask" and config._attn_implementation in (CAFE_TREE, CAFE_TREE_FLEX):
        # A mask of four dimensions is passed on to the layers as it is. Attention reads it where it needs a dense one.
        kernel = FlexTree(end) if tree.kernel == "flex" else tree.all_tokens and _to_model(lvlm, tree.all_tokens)
        return {"attention_mask": end[:, None, :, None], "tree": kernel}
    # SDPA takes a mask of numbers in the dtype of the queries.
    return {"attention_mask": dense_mask(end, _compute_dtype(lvlm), config._attn_implementation)}


def _to_model(lvlm: PreTrainedModel, tokens: Paths | Blocks) -> Paths | Blocks:
    """Move what attention takes to the model's device, for the kernel that there is."""
    tokens = tokens.to(lvlm.device)
    if not isinstance(tokens, Paths):
        return tokens
    head_dim = _head_dim(lvlm.config.get_text_config())
    return replace(tokens, fused=has_varlen_kernel(lvlm.device, _compute_dtype(lvlm), head_dim))


def _compute_dtype(lvlm: PreTrainedModel) -> torch.dtype:
    """Return the dtype of the queries: autocast's where it is enabled."""
    if torch.is_autocast_enabled(lvlm.device.type):
        return torch.get_autocast_dtype(lvlm.device.type)
    return lvlm.dtype
