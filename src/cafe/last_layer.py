"""The last layer's work behind attention, done only where its output is read.

Of the last hidden states a step reads those of the readouts and those before supervised tokens, and behind attention no
token learns of another. So the last layer's feed-forward part, most of its work, runs on those tokens alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

# What a layer of a known kind is made of; one with other parts may mix tokens in them.
KNOWN = {
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
def last_layer_at(lvlm: PreTrainedModel, *places: Int64[Tensor, "tokens 2"]) -> Iterator[None]:
    """Within it, the last hidden states of all tokens but those at the (row, column) of `places` mean nothing.

    Where layers are made again for the backward pass, or are of another kind, all tokens are computed.
    """
    handles = []
    at = torch.cat(places).unique(dim=0)  # each once: its gradient must not be counted twice
    for part in parts_of(lvlm):
        compute = At(at)
        handles += [part.register_forward_pre_hook(compute.pick), part.register_forward_hook(compute.put)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def parts_of(lvlm: PreTrainedModel) -> list[nn.Module]:
    """The parts of the last layer that work behind attention on one token at a time; none if it is made again."""
    layer = getattr(lvlm.get_decoder(), "layers", [None])[-1]
    if layer is None or not {name for name, _ in layer.named_children()} <= KNOWN:
        return []
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        return []
    parts = [part for name, part in layer.self_attn.named_children() if name == "o_proj"]
    alone = len(signature(layer.mlp.forward).parameters) == 1  # experts may want to be told the kind of each token
    return [*parts, layer.mlp] if alone else parts


class At:
    """Hooks that let a module see some tokens alone, and put what it makes of them in their places."""

    def __init__(self, places: Int64[Tensor, "tokens 2"]) -> None:
        self.places = places
        self.shape = torch.Size()

    def pick(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Before the module."""
        [hidden] = args
        self.shape = hidden.shape
        self.places = self.places.to(hidden.device, non_blocking=True)
        return (hidden[self.places[:, 0], self.places[:, 1]][None],)

    def put(self, module: nn.Module, args: Any, made: Any) -> Any:
        """Behind it; zeros elsewhere. What experts return beside, as their router's scores, is left as it is."""
        if isinstance(made, tuple):
            return (self.put(module, args, made[0]), *made[1:])
        every = made.new_zeros(*self.shape[:2], made.shape[-1])
        every[self.places[:, 0], self.places[:, 1]] = made[0]
        return every
