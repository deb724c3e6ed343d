"""How many FLOPs attention on a CPU takes, for the counter of PyTorch."""

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

# torch counts the attention of a GPU and leaves out that of a CPU, which works alike.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}
