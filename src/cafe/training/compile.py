"""`torch.compile` for training: each layer by itself, since the layers of a stack share what is compiled for one."""

import torch
import torch._functorch.config
from transformers import PreTrainedModel

from cafe.attention.last_layer import tokenwise_modules
from cafe.attention.registration import FLEX_IMPLEMENTATIONS
from cafe.training.fsdp import iter_layers


def allow_repeated_backward() -> None:
    """Let code that is compiled from now on run backward more than once.

    Steps that log gradient norms backpropagate each loss through the same graph (`retain_graph`, see
    `PerLossGradients`). By default PyTorch lets compiled backward passes overwrite saved activations ("donated
    buffers") and then refuses. This is a global setting of PyTorch, so it is made where models are prepared for
    training: here for compiled layers, in `build_step` for FlexAttention, which transformers compiles.
    """
    torch._functorch.config.donated_buffer = False


def compile_layers(lvlm: PreTrainedModel) -> None:
    """Compile a model's layers in place.

    The results stay the same; steps become faster once each kind of layer has run at a few lengths. The language
    model's last layer stays uncompiled where it computes other tokens from step to step (`cafe.attention.last_layer`).
    """
    allow_repeated_backward()
    # FlexAttention is compiled per shape: rows have few lengths. Otherwise one graph serves all lengths.
    is_flex = lvlm.config.get_text_config()._attn_implementation in FLEX_IMPLEMENTATIONS
    dynamic = None if is_flex else True
    changing = set(tokenwise_modules(lvlm))
    for layer in iter_layers(lvlm):
        if not changing.isdisjoint(layer.modules()):
            continue
        # `layer.compile` would also take in the hooks of gradient checkpointing and sharding. With `fallback_random`,
        # dropout draws the numbers that it draws uncompiled, so that the gradient cache can replay them.
        layer.forward = torch.compile(layer.forward, dynamic=dynamic, options={"fallback_random": True})
