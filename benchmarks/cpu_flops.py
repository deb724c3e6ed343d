"""FLOPs of attention on a CPU, for PyTorch's counter, which has no formula for it; the tests count by them too."""

from typing import Any

import torch
from torch import Tensor


def seen_pairs(query: Tensor, key: Tensor, is_causal: bool, attn_mask: Tensor | None) -> int:
    """Count the pairs of a query and a key that no mask hides, in all rows and heads."""
    rows, heads, queries, _ = query.shape
    if attn_mask is None:
        visible = torch.ones(queries, key.shape[2], dtype=torch.bool)
        return rows * heads * int((visible.tril() if is_causal else visible).sum())
    visible = attn_mask > torch.finfo(attn_mask.dtype).min
    repeats = rows * heads * queries * key.shape[2] // visible.numel()  # of a mask that rows or heads share
    return repeats * int(visible.sum())


def attention_flops(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, **options: Any
) -> int:
    """Count the operations of attention forward: two products."""
    return 4 * query.shape[-1] * seen_pairs(query, key, is_causal, options.get("attn_mask"))


def attention_backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
) -> int:
    """Count the operations of attention backward: two gradients of each product."""
    *_, is_causal = args
    return 8 * query.shape[-1] * seen_pairs(query, key, is_causal, options.get("attn_mask"))


# The counter hands such formulas the tensors, not their shapes alone.
for formula in (attention_flops, attention_backward_flops):
    formula._get_raw = True  # type: ignore[attr-defined]
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
