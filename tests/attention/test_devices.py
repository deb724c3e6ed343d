"""Attention over trees on each device: what runs on a GPU alone, in its precision, beside float64 on the CPU.

`pytest tests/attention/test_devices.py tests/test_cuda.py` runs what is particular to a GPU on a machine with one.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from branch_samples import branch
from model_samples import make
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tree_samples import checked_kernel, gradient_of, make_pack

import cafe.attention.paths
import cafe.attention.tree
from cafe.attention.masks import tree_mask
from cafe.attention.registration import attend, use_tree_attention
from cafe.attention.tree import make_tree, tree_attention
from cafe.lvlm.forward import forward_packed, set_kernel
from cafe.model import Cafe
from cafe.packing import PackingConfig, build_layout, pack

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Products of float32 matrices are of float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # FlexAttention's kernel goes by it too
    torch.compiler.reset()
    yield
    torch.set_float32_matmul_precision(before)


def random_states(rows, columns, heads, dim, dtype, device):
    """Return queries, keys and values as attention layers make them, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(rows, columns, count, dim, generator=generator).to(device, dtype).transpose(1, 2)
        for count in (*heads, heads[1])
    ]
    output_grad = torch.randn(rows, columns, heads[0], dim, generator=generator).to(device, dtype)
    return states, output_grad


def output_and_gradients(attention, states, output_grad):
    leaves = [each.detach().requires_grad_() for each in states]
    output = attention(*leaves)
    output.backward(output_grad)
    return [each.detach().cpu().double() for each in (output, *(leaf.grad for leaf in leaves))]


def float64_attention(end, query, key, value):
    """Compute attention under the dense mask from its definition."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~tree_mask(end), float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


def expected_of(end, states, output_grad):
    doubles = [each.detach().cpu().double() for each in states]
    return output_and_gradients(partial(float64_attention, end), doubles, output_grad.cpu().double())


def assert_close(actual, expected, tolerance):
    for one, other in zip(actual, expected, strict=True):
        assert one.isfinite().all()
        assert (one - other).norm() <= tolerance * other.norm()


def trees(*lengths):
    """Lay out pairs in one row: a prefix, of which two branches are continuations, and a text for each length."""
    groups = []
    for number, length in enumerate(lengths):
        prefix = [0, *[10 * number + 1] * length]
        tails = [[10 * number + 2] * 70, [10 * number + 3] * 9]
        groups.append([*(branch(prefix + tail) for tail in tails), branch([0, *[10 * number + 4] * (length // 2)])])
    return build_layout(groups, PackingConfig(max_row_tokens=10**6)).subtree_end


@on_each_device
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_paths_give_the_gradient_of_float64(device, dtype, dim):
    end = trees(130, 257, 64)
    states, output_grad = random_states(*end.shape, (14, 2), dim, dtype, device)
    read = torch.zeros_like(end, dtype=torch.bool)
    read[:, ::37], read[:, -50:] = True, True
    tree = make_tree(end, read.nonzero(), "paths")
    all_tokens, read_tokens = (each.to(torch.device(device)) for each in (tree.all_tokens, tree.read_tokens))
    assert_close(
        output_and_gradients(partial(all_tokens.attend, scale=None), states, output_grad),
        expected_of(end, states, output_grad),
        TOLERANCES[dtype],
    )
    # In the last layer only some of the output is read.
    output_grad[~read] = 0
    actual = output_and_gradients(partial(read_tokens.attend, scale=None), states, output_grad)
    expected = expected_of(end, states, output_grad)
    assert_close([actual[0][read], *actual[1:]], [expected[0][read], *expected[1:]], TOLERANCES[dtype])


@on_each_device
@pytest.mark.parametrize("num_branches", [2, 100])
def test_paths_of_one_query_give_the_gradient_of_float64(device, num_branches):
    """One token of each chain is read, as in the last layer of `embed`; a prefix has a gradient from every branch."""
    prefix = [1] * 40
    branches = [branch([*prefix, *[number] * 9]) for number in range(2, num_branches + 2)]
    layout = build_layout([branches], PackingConfig(max_row_tokens=10**6))
    end = layout.subtree_end
    last = torch.stack([coords[-1] for coords in layout.coords])
    states, output_grad = random_states(*end.shape, (14, 2), 64, torch.bfloat16, device)
    read = torch.zeros_like(end, dtype=torch.bool)
    read[last[:, 0], last[:, 1]] = True
    output_grad[~read] = 0
    read_tokens = make_tree(end, last, "paths").read_tokens.to(torch.device(device))
    actual = output_and_gradients(partial(read_tokens.attend, scale=None), states, output_grad)
    expected = expected_of(end, states, output_grad)
    assert_close([actual[0][read], *actual[1:]], [expected[0][read], *expected[1:]], TOLERANCES[torch.bfloat16])


@on_each_device
def test_gradients_under_a_dense_mask_are_finite_where_all_scores_are_low(random_base, device):
    """Of 704 columns cuDNN's would be NaN (pytorch/pytorch#196678), so rows are longer there."""
    model = Cafe.load(random_base, device=device, dtype=torch.bfloat16)
    model.lvlm.config.get_text_config().attention_dropout = 0.1  # for which there is no other kernel
    packing = set_kernel(model.packing, model.lvlm, model.lvlm.device, torch.bfloat16)
    assert packing.kernel == "mask"
    packed = pack([[branch([1] * 500 + [2] * 104), branch([1] * 500 + [3] * 100)]], [[]], packing)
    end = packed.tree.subtree_end
    assert end.shape == (1, 768 if device == "cuda" else 704)

    states, output_grad = random_states(*end.shape, (4, 2), 64, torch.bfloat16, device)
    states[0][..., 0], states[1][..., 0] = 1.0, -120 * 64**0.5
    with tree_attention(model.lvlm, packed.tree, packed.embedding_index) as inputs:
        mask = inputs["attention_mask"]
    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = 2, True
    actual = output_and_gradients(lambda *leaves: attend(layer, *leaves, mask)[0], states, output_grad)
    logsumexp = float64_logsumexp(end, *(each.cpu().double() for each in states[:2]))
    assert logsumexp.max() < -88.7
    # The gradient of the keys' first entry and that of the queries are small sums of large numbers.
    expected = expected_of(end, states, output_grad)
    assert_close([actual[0], actual[3]], [expected[0], expected[3]], TOLERANCES[torch.bfloat16])
    assert all(each.isfinite().all() for each in actual)


def float64_logsumexp(end, query, key):
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3) / query.shape[-1] ** 0.5
    return scores.masked_fill(~tree_mask(end), float("-inf")).logsumexp(-1)


@on_each_device
def test_layers_that_attend_by_paths_are_compiled_once_for_different_trees(device, monkeypatch, compilable):
    model = make("llava_onevision")
    dtype, tolerance, backend = torch.bfloat16, 0.1, "inductor"
    if device == "cpu":
        # A stand-in for the kernel, which is one operator to the compiler as well.
        monkeypatch.setattr(cafe.attention.paths, "causal_attention", checked_kernel)
        dtype, tolerance, backend = torch.float64, 1e-5, "aot_eager"
    model.lvlm.to(device, dtype).train()
    texts = [["what is it?", "why?"], ["is it?", "who?", "what is it called?"], ["where?", "a longer one?"], ["one"]]
    packs = [make_pack(model, "paths", *each) for each in texts]
    expected = [gradient_of(model, packed) for packed in packs]

    torch.compiler.reset()
    counters.clear()
    layer = model.lvlm.get_decoder().layers[0]
    layer.forward = torch.compile(layer.forward, dynamic=True, fullgraph=True, backend=backend)
    for packed, other in zip(packs, expected, strict=True):
        assert_close(gradient_of(model, packed), other, tolerance)
    assert counters["stats"]["unique_graphs"] == 1


@on_each_device
def test_flex_attention_serves_a_family_for_which_transformers_refuses_it(device):
    model = make("qwen2_5_vl")
    texts = ("what is it?", "why?")
    reference = model.lvlm.float()
    expected = gradient_of(model, make_pack(model, "mask", *texts))

    reference.to(device)
    reference.get_decoder().set_attn_implementation("sdpa")
    use_tree_attention(reference, "flex_attention")
    model.packing = set_kernel(model.packing, reference, torch.device(device), torch.float32)
    packed = make_pack(model, "flex", *texts)
    assert model.packing.kernel == "flex" and packed.inputs["input_ids"].shape == (1, 512)
    if device == "cuda":
        actual = [each.cpu() for each in gradient_of(model, packed)]
    else:  # FlexAttention has no backward pass on a CPU
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            actual = list(forward_packed(reference, packed))
    for one, other in zip(actual, expected, strict=False):
        assert (one - other).norm() <= 1e-4 * other.norm()


@needs_gpu
def test_a_model_in_16_bits_attends_by_flash_attention_without_a_mask(random_base, monkeypatch):
    model = Cafe.load(random_base, dtype=torch.bfloat16)
    assert model.packing.kernel == "paths"
    texts = [branch([*range(3, 60), *[number] * 40]) for number in (61, 62)]  # without an image: no vision tower
    packed = pack([texts], [[branch([*range(3, 50)], num_supervised=9)]], model.packing)
    gradient_of(model, packed)
    monkeypatch.setattr(cafe.attention.tree, "dense_mask", lambda *args: pytest.fail("a dense mask was made"))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        gradient_of(model, packed)
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    assert any("flash_fwd" in name for name in names) and any("flash_bwd" in name for name in names), sorted(set(names))
    # Those of cuDNN and the memory-efficient one.
    assert not [name for name in names if "sdpa" in name or "fmha" in name]
