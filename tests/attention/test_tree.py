"""Every kernel of attention over trees against PyTorch's SDPA under the dense mask."""

import pytest
import torch
import torch.nn.functional as F
from branch_samples import branch, examples
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.attention.masks import tree_mask
from cafe.attention.registration import CAFE_TREE, CAFE_TREE_FLEX
from cafe.attention.tree import choose_kernel, make_tree, tree_attention
from cafe.lvlm.forward import forward_packed
from cafe.model import Cafe
from cafe.packing import PackingConfig, build_layout, pack

HEADS, KEY_HEADS, DIM = 4, 2, 8


def random_states(rows, columns):
    """Return queries, keys and values as attention layers make them, in float64, and weights of the output."""
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(rows, columns, heads, DIM, generator=generator, dtype=torch.float64).transpose(1, 2)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    weights = torch.randn(rows, columns, HEADS, DIM, generator=generator, dtype=torch.float64)
    return [each.requires_grad_() for each in states], weights


def output_and_gradients(attend, end, read):
    """Return the output where it is read, and the gradients of a weighted sum of that."""
    states, weights = random_states(*end.shape)
    output = attend(*states)[read]
    (output * weights[read]).sum().backward()
    return [output, *(each.grad for each in states)]


def dense(end, scale):
    def attend(query, key, value):
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=tree_mask(end), scale=scale, enable_gqa=True
        )
        return output.transpose(1, 2)

    return attend


@pytest.mark.parametrize("kernel", ["blocks", "paths"])
@settings(max_examples=100, deadline=None)
@given(examples(), st.integers(1, 60), st.sampled_from([1, 16]), st.sampled_from([None, 0.3]), st.randoms())
def test_a_kernel_gives_the_output_and_gradients_of_the_dense_mask(kernel, groups, max_tokens, multiple, scale, random):
    layout = build_layout(groups, PackingConfig(max_row_tokens=max_tokens, pad_to_multiple_of=multiple))
    end, valid = layout.subtree_end, layout.valid.nonzero()
    read_index = valid[random.sample(range(len(valid)), random.randint(1, len(valid)))]
    tree = make_tree(end, read_index, kernel)
    assert tree.kernel == kernel
    read = torch.zeros_like(end, dtype=torch.bool)
    read[read_index[:, 0], read_index[:, 1]] = True
    for prepared, where in ((tree.all_tokens, torch.ones_like(read)), (tree.read_tokens, read)):
        actual = output_and_gradients(lambda *states, by=prepared: by.attend(*states, scale), end, where)
        for one, other in zip(actual, output_and_gradients(dense(end, scale), end, where), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kernel", ["blocks", "paths"])
def test_states_with_any_strides_give_the_same_attention(kernel):
    end = torch.tensor([[5, 3, 3, 5, 5]])
    states = [torch.randn(1, 2, 8, 5, dtype=torch.float64).transpose(2, 3).requires_grad_() for _ in range(3)]
    tree = make_tree(end, torch.empty(0, 2, dtype=torch.long), kernel)
    assert tree.read_tokens is None  # nothing is read
    output = tree.all_tokens.attend(*states, None)
    expected = dense(end, None)(*states)
    torch.testing.assert_close(output, expected)
    for one, other in zip(*(torch.autograd.grad(each.sum(), states) for each in (output, expected)), strict=True):
        torch.testing.assert_close(one, other)


KERNELS = ["mask", "blocks", "paths"]


def gradient_by(model, packing, dtype=None):
    """Return the hidden states that are read of a small pack, and the gradient of a sum of their squares."""
    group = [branch([*range(10, 30)]), branch([*range(10, 20), *range(40, 60)]), branch([*range(10, 14), 7, 8])]
    dialogue = branch([*range(10, 40)], num_supervised=9)
    packed = pack([group], [[dialogue]], packing)
    assert packed.tree.kernel == packing.kernel
    model.lvlm.zero_grad()
    with torch.autocast("cpu", dtype, enabled=bool(dtype)):
        readouts, predictors = forward_packed(model.lvlm, packed)
    (readouts.square().sum() + predictors.square().sum()).backward()
    grads = torch.cat([p.grad.flatten() for p in model.lvlm.parameters() if p.grad is not None])
    return readouts.detach().double(), predictors.detach().double(), grads


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-10), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_a_model_gives_the_same_gradient_by_every_kernel(random_base, dtype, tolerance):
    model = Cafe.load(random_base, dtype=torch.float32 if dtype else torch.float64)
    results = [gradient_by(model, PackingConfig(max_row_tokens=80, kernel=kernel), dtype) for kernel in KERNELS]
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_dropout_is_applied_under_the_dense_mask(random_base, kernel):
    model = Cafe.load(random_base, dtype=torch.float64)
    for layer in model.lvlm.train().model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    results = []
    for each in ("mask", kernel):
        torch.manual_seed(0)
        results.append(gradient_by(model, PackingConfig(max_row_tokens=80, kernel=each)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_kernels_are_chosen_by_device_dtype_and_attention_implementation(random_base, monkeypatch):
    config = Cafe.load(random_base).lvlm.config.get_text_config()
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert config._attn_implementation == CAFE_TREE
    assert choose_kernel(config, cpu, torch.float32) == choose_kernel(config, cpu, torch.bfloat16) == "blocks"
    assert choose_kernel(config, gpu, torch.bfloat16) == choose_kernel(config, gpu, torch.float16) == "paths"
    assert choose_kernel(config, gpu, torch.float32) == "mask"
    for name, value in (("head_dim", 12), ("head_dim", 512), ("attention_dropout", 0.1)):
        with monkeypatch.context() as patch:
            patch.setattr(config, name, value, raising=False)
            assert choose_kernel(config, gpu, torch.bfloat16) == "mask"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert choose_kernel(config, gpu, torch.bfloat16) == "mask"
    assert choose_kernel(config, None, torch.bfloat16) == "paths"  # of a GPU that is not here
    config._attn_implementation = CAFE_TREE_FLEX
    assert choose_kernel(config, gpu, torch.bfloat16) == "flex"
    with monkeypatch.context() as patch:
        patch.setattr(config, "attention_dropout", 0.1)
        assert choose_kernel(config, gpu, torch.bfloat16) == "mask"
    config._attn_implementation = "eager"
    assert choose_kernel(config, gpu, torch.bfloat16) == "mask"


@pytest.mark.parametrize("columns", [5, 8, 9])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_dense_mask_is_additive_and_aligned_so_that_a_gpu_copies_nothing(random_base, columns, attention):
    lvlm = Cafe.load(random_base, attention=attention, dtype=torch.bfloat16).lvlm
    end = torch.tensor([[columns, 3, 3, *[columns] * (columns - 3)], list(range(1, columns + 1))])
    read_index = torch.tensor([[0, 1]])
    with tree_attention(lvlm, make_tree(end, read_index, "mask"), read_index) as inputs:
        mask = inputs["attention_mask"]
    assert mask.dtype == torch.bfloat16 and mask.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])  # as PyTorch's `preprocess_mask` wants them
    assert torch.equal(mask == 0, tree_mask(end))
    masked = float("-inf") if attention == "sdpa" else torch.finfo(torch.bfloat16).min
    assert mask[mask != 0].unique().tolist() == [masked]


def test_trees_for_a_cpu_are_read_under_the_dense_mask_by_a_model_that_looks_at_none(random_base):
    expected = gradient_by(Cafe.load(random_base, dtype=torch.float64), PackingConfig(kernel="blocks"))
    model = Cafe.load(random_base, dtype=torch.float64, attention="eager")
    for actual, other in zip(gradient_by(model, PackingConfig(kernel="blocks")), expected, strict=True):
        assert (actual - other).norm() <= 1e-5 * other.norm()  # eager attention has its softmax in float32
