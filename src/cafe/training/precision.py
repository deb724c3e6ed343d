"""The dtypes of a run: what the model computes in, and what its weights are loaded in."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cafe.training.recipe import ModelConfig

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the 16-bit values of `model.precision`


def loading_dtype(config: "ModelConfig") -> torch.dtype:
    """Return the dtype to load the weights in.

    Weights that are trained stay in float32. An adapter freezes all of them, so they can be loaded in 16 bits at once.
    """
    if config.adapter and config.frozen_weights_dtype != "fp32":
        return AUTOCAST_DTYPES[config.precision]
    return torch.float32
