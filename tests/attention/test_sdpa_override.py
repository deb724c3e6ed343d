"""A mask that overrides attention, and is a plain mask to everything else."""

import torch
import torch.nn.functional as F

from cafe.attention.sdpa_override import SdpaOverrideMask


def test_sdpa_is_overridden_where_the_mask_is_passed_and_nowhere_else():
    states = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    plain = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    mask = SdpaOverrideMask.wrap(plain, lambda query, key, value, attn_mask, scale: query * scale + attn_mask.sum())
    assert torch.equal(F.scaled_dot_product_attention(*states, attn_mask=mask, scale=2.0), 2 * states[0] + 6)
    assert type(mask[..., :2]) is torch.Tensor and torch.equal(mask[..., :2], plain[..., :2])
    other = SdpaOverrideMask.wrap(mask, lambda *states, attn_mask: states[2])  # the first keeps its own
    assert torch.equal(F.scaled_dot_product_attention(*states, attn_mask=other), states[2])
    assert torch.equal(F.scaled_dot_product_attention(*states, attn_mask=mask, scale=1.0), states[0] + 6)
