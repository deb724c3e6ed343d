"""`cafe_tree` in the language models of all families: every kernel, gradient checkpointing, compilation, generation."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from model_samples import READ_ONE_BY_ONE, WIDE, chat, gradient, make
from torch._dynamo.testing import CompileCounterWithBackend

import cafe.attention.paths
import cafe.attention.tree
from cafe.attention.paths import Paths, attend_one_by_one
from cafe.attention.registration import CAFE_TREE
from cafe.content import Content
from cafe.lvlm.forward import forward_packed
from cafe.packing import pack
from cafe.training.optimizer import enable_gradient_checkpointing

SHARING = [family for family in FAMILIES if family not in READ_ONE_BY_ONE]


@pytest.fixture(autouse=True)
def short_rows_are_read_by_blocks(monkeypatch):
    monkeypatch.setattr(cafe.attention.tree, "MIN_BLOCKWISE_TOKENS", 1)


def make_pack(model, kernel, *texts):
    """Pack an image by itself and questions about it, each with an answer, and a text."""
    image = model.chat_processor.load_images(Content.of([WIDE]).images)
    embedded = [model.encode_embedding(Content.of([WIDE]), image), model.encode_embedding(Content.of("a text"))]
    dialogues = [model.encode_dialogue(chat(Content.of([WIDE, text]), "an answer"), image) for text in texts]
    return pack([embedded], [dialogues], replace(model.packing, kernel=kernel))


def gradient_of(model, packed):
    """Return what is read of a pack, and the gradient of a sum of its squares."""
    model.lvlm.zero_grad()
    readouts, predictors = forward_packed(model.lvlm, packed)
    (readouts.square().sum() + predictors.square().sum()).backward()
    return [readouts.detach(), predictors.detach(), gradient(model)]


def assert_close(results, expected):
    # Some families have norms in float32.
    for actual, other in zip(results, expected, strict=True):
        assert (actual - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", SHARING)
def test_every_kernel_gives_the_gradient_of_the_dense_mask(family, checkpointing):
    model = make(family)
    model.lvlm.double().train()
    assert model.lvlm.config.get_text_config()._attn_implementation == CAFE_TREE
    if checkpointing:
        enable_gradient_checkpointing(model.lvlm)
    expected = gradient_of(model, make_pack(model, "mask", "what is it?", "why?"))
    for kernel in ("blocks", "paths"):
        packed = make_pack(model, kernel, "what is it?", "why?")
        assert packed.tree.kernel == kernel
        assert_close(gradient_of(model, packed), expected)


@torch.library.custom_op("tests::varlen_attention", mutates_args=())
def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest_query: int,
    longest_key: int,
    scale: float,
) -> torch.Tensor:
    """Check what PyTorch's variable-length kernel takes, and compute what it computes."""
    for starts, longest, states in ((query_starts, longest_query, query), (key_starts, longest_key, key)):
        assert starts.dtype == torch.int32 and starts.is_contiguous()
        lengths = starts.diff()
        assert starts[0] == 0 and (lengths > 0).all()
        assert starts[-1] == len(states) and lengths.max() == longest
    assert (key_starts.diff() >= query_starts.diff()).all()
    assert query.shape[1] % key.shape[1] == 0 and key.shape == value.shape
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    paths = Paths(None, torch.arange(len(key)), query_starts, key_starts, longest_query, longest_key)
    return attend_one_by_one(query, key, value, paths, scale)


@varlen_attention.register_fake
def _(query, *rest):
    return torch.empty_like(query)


def keep_for_backward(ctx, inputs, output):
    *tensors, ctx.longest_query, ctx.longest_key, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


@torch.library.custom_op("tests::varlen_backward", mutates_args=())
def varlen_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Differentiate the reference."""
    with torch.enable_grad():
        states = [each.detach().requires_grad_() for each in (query, key, value)]
        paths = Paths(None, torch.arange(len(key)), query_starts, key_starts, 0, 0)
        output = attend_one_by_one(*states, paths, scale)
    first, second, third = torch.autograd.grad(output, states, grad)
    return first, second, third


@varlen_backward.register_fake
def _(grad, query, key, value, *rest):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def backward(ctx, grad):
    query, key, value, query_starts, key_starts = ctx.saved_tensors
    grads = torch.ops.tests.varlen_backward(grad, query, key, value, query_starts, key_starts, ctx.scale)
    return (*grads, None, None, None, None, None)


varlen_attention.register_autograd(backward, setup_context=keep_for_backward)


def checked_kernel(query, key, value, paths, scale):
    """Stand for PyTorch's kernel at the seam."""
    starts, longest = (paths.query_starts, paths.key_starts), (paths.longest_query, paths.longest_key)
    return torch.ops.tests.varlen_attention(query, key, value, *starts, *longest, scale)


@pytest.mark.parametrize("kernel", ["blocks", "paths", "mask"])
@pytest.mark.parametrize("family", SHARING)
def test_compiled_layers_are_one_graph_for_packs_of_different_trees(family, kernel, monkeypatch):
    monkeypatch.setattr(cafe.attention.paths, "causal_attention", checked_kernel)
    model = make(family)
    model.lvlm.double().train()
    texts = [["what is it?", "why?"], ["is it?", "who?", "what is it called?"], ["where?", "a longer one?"], ["one"]]
    packs = [make_pack(model, kernel, *each) for each in texts]
    assert len({packed.tree.subtree_end.shape[1] for packed in packs}) > 1
    expected = [gradient_of(model, packed) for packed in packs]

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    first, *_ = model.lvlm.get_decoder().layers
    first.forward = torch.compile(first.forward, dynamic=True, fullgraph=True, backend=counter)
    for packed, other in zip(packs, expected, strict=True):
        assert_close(gradient_of(model, packed), other)
    assert counter.frame_count == 1
