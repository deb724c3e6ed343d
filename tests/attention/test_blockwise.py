"""Blockwise attention against PyTorch's own under the dense mask, alone and in a model."""

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
    """Return the attention of random states, and the gradients of a weighted sum of it."""
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(*end.shape, 2, 8, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]
    output = F.scaled_dot_product_attention(*states, attn_mask=mask, **options)
    output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64))
    return [output, *(state.grad for state in states)]


@settings(max_examples=100, deadline=None)
@given(examples(), st.integers(1, 60), st.sampled_from([1, 16]), st.sampled_from([None, 0.3]))
def test_blockwise_attention_and_gradients_equal_those_of_the_dense_mask(groups, max_tokens, multiple, scale):
    config = PackingConfig(max_row_tokens=max_tokens, pad_to_multiple_of=multiple)
    end = build_layout(groups, config).subtree_end
    dense, blockwise = attention(end, tree_mask(end), scale=scale), attention(end, blockwise_mask(end), scale=scale)
    for actual, expected in zip(blockwise, dense, strict=True):
        torch.testing.assert_close(actual, expected)


@settings(max_examples=100, deadline=None)
@given(examples(), st.integers(1, 60))
def test_blocks_cover_the_mask_once(groups, max_tokens):
    end = build_layout(groups, PackingConfig(max_row_tokens=max_tokens)).subtree_end
    count = torch.zeros(*end.shape, end.shape[1], dtype=torch.long)
    for block in tree_to_blocks(end):
        view = count[block.row, block.queries, block.keys]
        view += torch.ones_like(view).tril() if block.causal else 1
    alone = (count.sum(2) == 0).nonzero()
    count[alone[:, 0], alone[:, 1], alone[:, 1]] = 1
    assert torch.equal(count, tree_mask(end)[:, 0].long())


def test_blockwise_mask_is_a_plain_mask_to_other_operations():
    end = torch.tensor([[5, 3, 3, 5, 5]])
    mask = blockwise_mask(end)
    assert type(mask[:, :, :3]) is torch.Tensor and torch.equal(mask[..., 0], tree_mask(end)[..., 0])
    of_slice = attention(end, mask[:, :, :, :5])
    for actual, expected in zip(of_slice, attention(end, tree_mask(end)), strict=True):
        torch.testing.assert_close(actual, expected)


def test_states_with_strides_the_kernel_does_not_take_give_the_same_attention():
    end = torch.tensor([[5, 3, 3, 5, 5]])
    states = [torch.randn(1, 2, 8, 5).transpose(2, 3) for _ in range(3)]
    dense = F.scaled_dot_product_attention(*states, attn_mask=tree_mask(end))
    torch.testing.assert_close(F.scaled_dot_product_attention(*states, attn_mask=blockwise_mask(end)), dense)


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-10), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_a_model_gives_the_same_gradient_with_blockwise_attention(random_base, monkeypatch, dtype, tolerance):
    model = Cafe.load(random_base, dtype=torch.float32 if dtype else torch.float64)
    group = [branch([*range(10, 30)]), branch([*range(10, 20), *range(40, 60)]), branch([*range(10, 14), 7, 8])]
    dialogue = branch([*range(10, 40)], num_supervised=9)
    packed = pack([group], [[dialogue]], PackingConfig(max_row_tokens=80))
    results = {}
    for name, min_tokens in (("blockwise", 1), ("dense", 10**6)):
        monkeypatch.setattr(cafe.attention.tree, "MIN_BLOCKWISE_TOKENS", min_tokens)
        mask = attention_mask(packed.subtree_end, model.lvlm.config.get_text_config())
        assert isinstance(mask, SdpaOverrideMask) == (name == "blockwise")
        model.lvlm.zero_grad()
        with torch.autocast("cpu", dtype, enabled=bool(dtype)):
            readouts, predictors = forward_packed(model.lvlm, packed)
        (readouts.square().sum() + predictors.square().sum()).backward()
        grads = torch.cat([p.grad.flatten() for p in model.lvlm.parameters() if p.grad is not None])
        results[name] = readouts.detach().double(), predictors.detach().double(), grads
    for actual, expected in zip(results["blockwise"], results["dense"], strict=True):
        assert (actual - expected).norm() <= tolerance * expected.norm()
