"""Attention by blocks against PyTorch's own under the dense mask, and in a model's step."""

import pytest
import torch
import torch.nn.functional as F
from branch_samples import branch, examples
from hypothesis import given, settings
from hypothesis import strategies as st

import cafe.attention.tree
from cafe.attention.blockwise import blockwise_mask, tree_to_blocks
from cafe.attention.masks import tree_mask
from cafe.attention.sdpa_override import SdpaOverrideMask
from cafe.attention.tree import attention_mask
from cafe.lvlm.forward import forward_packed
from cafe.model import Cafe
from cafe.packing import PackingConfig, build_layout, pack


def attention(end, mask, **options):
    """What attention makes of random states, and the gradients of a weighted sum of it."""
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(*end.shape, 2, 8, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]
    made = F.scaled_dot_product_attention(*states, attn_mask=mask, **options)
    made.backward(torch.randn(made.shape, generator=generator, dtype=torch.float64))
    return [made, *(each.grad for each in states)]


@settings(max_examples=100, deadline=None)
@given(examples(), st.integers(1, 60), st.sampled_from([1, 16]), st.sampled_from([None, 0.3]))
def test_blocks_make_what_the_dense_mask_makes(groups, columns, multiple, scale):
    layout = build_layout(groups, PackingConfig(max_row_tokens=columns, pad_to_multiple_of=multiple))
    plain = attention(layout.subtree_end, tree_mask(layout.subtree_end), scale=scale)
    for one, other in zip(
        attention(layout.subtree_end, blockwise_mask(layout.subtree_end), scale=scale), plain, strict=True
    ):
        torch.testing.assert_close(one, other)


@settings(max_examples=100, deadline=None)
@given(examples(), st.integers(1, 60))
def test_the_blocks_are_the_mask_and_nothing_is_in_two(groups, columns):
    end = build_layout(groups, PackingConfig(max_row_tokens=columns)).subtree_end
    times = torch.zeros(*end.shape, end.shape[1], dtype=torch.long)
    for block in tree_to_blocks(end):
        part = times[block.row, block.queries, block.keys]
        part += torch.ones_like(part).tril() if block.causal else 1
    alone = (times.sum(2) == 0).nonzero()
    times[alone[:, 0], alone[:, 1], alone[:, 1]] = 1
    assert torch.equal(times, tree_mask(end)[:, 0].long())


def test_all_else_sees_a_plain_mask():
    end = torch.tensor([[5, 3, 3, 5, 5]])
    mask = blockwise_mask(end)
    assert type(mask[:, :, :3]) is torch.Tensor and torch.equal(mask[..., 0], tree_mask(end)[..., 0])
    half = attention(end, mask[:, :, :, :5])
    for one, other in zip(half, attention(end, tree_mask(end)), strict=True):
        torch.testing.assert_close(one, other)


def test_strided_states_give_what_pytorchs_own_attention_gives():
    end = torch.tensor([[5, 3, 3, 5, 5]])
    states = [torch.randn(1, 2, 8, 5).transpose(2, 3) for _ in range(3)]
    plain = F.scaled_dot_product_attention(*states, attn_mask=tree_mask(end))
    torch.testing.assert_close(F.scaled_dot_product_attention(*states, attn_mask=blockwise_mask(end)), plain)


@pytest.mark.parametrize(("half", "tolerance"), [(None, 1e-10), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_a_model_reads_long_rows_by_blocks_as_it_reads_short_ones(random_base, monkeypatch, half, tolerance):
    model = Cafe.load(random_base, dtype=torch.float32 if half else torch.float64)
    said = [[*range(10, 30)], [*range(10, 20), *range(40, 60)], [*range(10, 14), 7, 8]]
    group = [branch(ids) for ids in said]
    made = {}
    for name, long in (("by blocks", 1), ("dense", 10**6)):
        monkeypatch.setattr(cafe.attention.tree, "MIN_BLOCKWISE_TOKENS", long)
        packed = pack([group], [[branch([*range(10, 40)], spoken=9)]], PackingConfig(max_row_tokens=80))
        text = model.lvlm.config.get_text_config()
        assert isinstance(attention_mask(packed.subtree_end, text), SdpaOverrideMask) == (long == 1)
        model.lvlm.zero_grad()
        with torch.autocast("cpu", half, enabled=bool(half)):
            embedded, before = forward_packed(model.lvlm, packed)
        (embedded.square().sum() + before.square().sum()).backward()
        grads = torch.cat([part.grad.flatten() for part in model.lvlm.parameters() if part.grad is not None])
        made[name] = embedded.detach().double(), before.detach().double(), grads
    for one, other in zip(made["by blocks"], made["dense"], strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
