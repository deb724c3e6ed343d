"""A mask under which `scaled_dot_product_attention` is computed by a function of ours."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class SdpaOverrideMask(Tensor):
    """Carry an implementation of `scaled_dot_product_attention` in an attention mask.

    A model passes the mask on from layer to layer without looking at it, so the override reaches attention without a
    change to the model. For every other operation this is a plain mask, and results are plain tensors.
    """

    sdpa: Callable[..., Tensor]

    @classmethod
    def wrap(cls, mask: Tensor, sdpa: Callable[..., Tensor]) -> "SdpaOverrideMask":
        """Attach an implementation, which takes the arguments of `scaled_dot_product_attention`, to a mask."""
        wrapped: SdpaOverrideMask = mask.as_subclass(cls)
        wrapped.sdpa = sdpa
        return wrapped

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask")
        if func is F.scaled_dot_product_attention and isinstance(mask, SdpaOverrideMask):
            func = getattr(mask, "sdpa", func)  # only what `wrap` returned has one
        # Within, the mask is a plain tensor: the override may call the function that it replaces.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
