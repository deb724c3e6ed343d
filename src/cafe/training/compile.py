"""`torch.compile` for training: each layer by itself, since those of a stack are alike and share what is compiled."""

import torch
from transformers import PreTrainedModel

from cafe.attention.last_layer import tokenwise_modules
from cafe.training.fsdp import iter_layers


def compile_layers(lvlm: PreTrainedModel) -> None:
    """Compiles a model's layers in place; they read as before, and faster once each kind was read at a few lengths.

    The language model's last layer stays as it is where it computes other tokens from step to step
    (`cafe.last_layer`). Dropout draws the numbers that it draws uncompiled, so that the gradient cache can replay it.
    """
    of_any_length = None if lvlm.config.get_text_config()._attn_implementation == "flex_attention" else True
    changing = set(tokenwise_modules(lvlm))
    for layer in iter_layers(lvlm):
        if changing.isdisjoint(layer.modules()):
            # Not `layer.compile`, which takes in the hooks of checkpointing and sharding.
            layer.forward = torch.compile(layer.forward, dynamic=of_any_length, options={"fallback_random": True})
