"""How many FLOPs attention on a CPU takes, for the counter of PyTorch: those of the pairs that are not masked."""

from typing import Any

import torch
from torch import Tensor


def unmasked_pairs(query: Tensor, key: Tensor, is_causal: bool, attn_mask: Tensor | None) -> int:
    """Count the (query, key) pairs of all rows and heads that the mask of a call shows."""
    shape = *query.shape[:3], key.shape[2]
    if attn_mask is None:
        attn_mask = torch.ones(shape[2:], dtype=torch.bool)
        attn_mask = (attn_mask.tril() if is_causal else attn_mask).float().log()
    return int((attn_mask > torch.finfo(attn_mask.dtype).min).expand(shape).sum())


def forward(query: Tensor, key: Tensor, value: Tensor, dropout_p=0.0, is_causal=False, **options: Any) -> int:
    return 4 * unmasked_pairs(query, key, is_causal, options.get("attn_mask")) * query.shape[-1]


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output, logsumexp, dropout_p, is_causal, **options: Any
) -> int:
    """Each of the two products has two gradients; that the kernel computes the scores again is not counted."""
    return 8 * unmasked_pairs(query, key, is_causal, options.get("attn_mask")) * query.shape[-1]


forward._get_raw = backward._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes alone

# torch counts the attention of a GPU, masked pairs too, and leaves out that of a CPU.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
}
