"""The last layer's work, done only where its output is read.

Of the last hidden states a step reads those of the readouts and those before supervised tokens. So in the last layer
only these tokens ask others in attention, under a mask of ours, and only these go through the feed-forward part.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from cafe.attention.sdpa_override import SdpaOverrideMask

# What a layer of a known kind is made of; one with other parts may mix tokens in them.
SUPPORTED_CHILDREN = {
    "self_attn",
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
}


@contextmanager
def restrict_last_layer(lvlm: PreTrainedModel, *places: Int64[Tensor, "tokens 2"]) -> Iterator[None]:
    """Within it, the last hidden states of all tokens but those at the (row, column) of `places` mean nothing.

    Where layers are made again for the backward pass, or are of another kind, all tokens are computed.
    """
    handles = []
    at = torch.cat(places).unique(dim=0)  # each once, in order: its gradient must not be counted twice
    parts = tokenwise_modules(lvlm)
    for part in parts:
        compute = TokenwiseHooks(at)
        handles += [
            part.register_forward_pre_hook(_this_thread_only(compute.gather)),
            part.register_forward_hook(_this_thread_only(compute.scatter)),
        ]
    if parts:
        attention = lvlm.get_decoder().layers[-1].self_attn
        handles.append(
            attention.register_forward_pre_hook(_this_thread_only(QuerySubset(at).pre_hook), with_kwargs=True)
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _this_thread_only(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook in this thread alone: another may read with the same model meanwhile, as where an answer is streamed."""
    thread = get_ident()
    return lambda *args: hook(*args) if get_ident() == thread else None


def tokenwise_modules(lvlm: PreTrainedModel) -> list[nn.Module]:
    """The parts of the last layer that work behind attention on one token at a time; none if it is made again."""
    layer = getattr(lvlm.get_decoder(), "layers", [None])[-1]
    if layer is None or not {name for name, _ in layer.named_children()} <= SUPPORTED_CHILDREN:
        return []
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        return []
    parts = [part for name, part in layer.self_attn.named_children() if name == "o_proj"]
    alone = len(signature(layer.mlp.forward).parameters) == 1  # experts may want to be told the kind of each token
    return [*parts, layer.mlp] if alone else parts


class TokenwiseHooks:
    """Hooks that let a module see some tokens alone, and put what it makes of them in their places."""

    def __init__(self, coords: Int64[Tensor, "tokens 2"]) -> None:
        self.coords = coords
        self.shape = torch.Size()

    def gather(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Before the module."""
        [hidden] = args
        self.shape = hidden.shape
        self.coords = self.coords.to(hidden.device, non_blocking=True)
        return (hidden[self.coords[:, 0], self.coords[:, 1]][None],)

    def scatter(self, module: nn.Module, args: Any, made: Any) -> Any:
        """Behind it; zeros elsewhere. What experts return beside, as their router's scores, is left as it is."""
        if isinstance(made, tuple):
            return (self.scatter(module, args, made[0]), *made[1:])
        every = made.new_zeros(*self.shape[:2], made.shape[-1])
        every[self.coords[:, 0], self.coords[:, 1]] = made[0]
        return every


class QuerySubset:
    """The tokens that ask in attention: of each row those at its places, filled up to as many as any row has."""

    def __init__(self, places: Int64[Tensor, "tokens 2"]) -> None:
        self.rows, self.columns = places.unbind(1)
        counts = self.rows.bincount()
        self.slots = torch.arange(len(places)) - (counts.cumsum(0) - counts)[self.rows]
        self.grid = torch.zeros(len(counts), int(counts.max()) if len(places) else 0, dtype=torch.long)
        self.grid[self.rows, self.slots] = self.columns

    def pre_hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the attention module: gives it a mask that lets these tokens alone ask."""
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 4 or len(mask) != len(self.grid):
            return args, kwargs
        if 2 * self.grid.shape[1] > mask.shape[2]:  # not much less than all
            return args, kwargs
        return args, {**kwargs, "attention_mask": SdpaOverrideMask.wrap(mask, self.sdpa)}

    def sdpa(
        self,
        query: Float[Tensor, "rows heads columns dim"],
        key: Float[Tensor, "rows key_heads columns dim"],
        value: Float[Tensor, "rows key_heads columns dim"],
        attn_mask: Float[Tensor, "rows mask_heads columns columns"] | Bool[Tensor, "rows mask_heads columns columns"],
        **options: Any,
    ) -> Float[Tensor, "rows heads columns dim"]:
        """PyTorch's attention for these tokens; zeros for the others."""
        grid, rows, slots, columns = (
            each.to(query.device, non_blocking=True) for each in (self.grid, self.rows, self.slots, self.columns)
        )
        at = grid[:, None, :, None]
        asking = query.gather(2, at.expand(-1, query.shape[1], -1, query.shape[3]))
        seen = attn_mask.gather(2, at.expand(-1, attn_mask.shape[1], -1, attn_mask.shape[3]))
        made = F.scaled_dot_product_attention(asking, key, value, attn_mask=seen, **options).transpose(1, 2)
        every = made.new_zeros(len(query), query.shape[2], *made.shape[2:])
        every[rows, columns] = made[rows, slots]
        return every.transpose(1, 2)
