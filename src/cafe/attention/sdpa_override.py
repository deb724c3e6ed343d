"""A mask under which PyTorch's attention goes a way of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class SdpaOverrideMask(Tensor):
    """A mask that holds what is called in place of `scaled_dot_product_attention`. To all else it is that mask."""

    sdpa: Callable[..., Tensor]

    @classmethod
    def wrap(cls, mask: Tensor, attend: Callable[..., Tensor]) -> "SdpaOverrideMask":
        """A mask with its own way of attention, which takes the same arguments."""
        own: SdpaOverrideMask = mask.as_subclass(cls)
        own.sdpa = attend
        return own

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask")
        if func is F.scaled_dot_product_attention and isinstance(mask, SdpaOverrideMask) and hasattr(mask, "sdpa"):
            func = mask.sdpa  # a part of the mask has none
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
