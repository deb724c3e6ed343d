"""Packs for families that share prefixes, and a stand-in for the variable-length kernel that checks its arguments."""

from dataclasses import replace
from itertools import pairwise

import torch
from families import FAMILIES
from model_samples import READ_ONE_BY_ONE, WIDE, chat, gradient

from cafe.attention.paths import Paths, attend_one_by_one
from cafe.content import Content
from cafe.lvlm.content_encoder import ContentEncoder
from cafe.lvlm.forward import forward_packed
from cafe.packing import pack

SHARING = [family for family in FAMILIES if family not in READ_ONE_BY_ONE]


def make_pack(model, kernel, *texts):
    """Pack an image by itself and questions about it, each with an answer, and a text."""
    encoder = ContentEncoder(model.chat_processor)
    embedded = [encoder.encode_embedding(Content.of([WIDE])), encoder.encode_embedding(Content.of("a text"))]
    dialogues = [encoder.encode_dialogue(chat(Content.of([WIDE, text]), "an answer")) for text in texts]
    return pack([embedded], [dialogues], replace(model.packing, kernel=kernel))


def gradient_of(model, packed):
    """Return what is read of a pack, and the gradient of a sum of its squares."""
    model.lvlm.zero_grad()
    readouts, predictors = forward_packed(model.lvlm, packed)
    (readouts.square().sum() + predictors.square().sum()).backward()
    return [readouts.detach(), predictors.detach(), gradient(model)]


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
        assert starts[-1] == len(states) and max(2, int(lengths.max())) == longest  # with 1 it takes another way
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
    """Differentiate the softmax and both products, a sequence at a time."""
    grads = [torch.zeros_like(each) for each in (query, key, value)]
    group = query.shape[1] // key.shape[1]
    for (start, stop), (key_start, key_stop) in zip(
        pairwise(query_starts.tolist()), pairwise(key_starts.tolist()), strict=True
    ):
        q, g = query[start:stop], grad[start:stop]
        k, v = (each[key_start:key_stop].repeat_interleave(group, 1) for each in (key, value))
        causal = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        weight_grad = torch.einsum("qhd,khd->hqk", g, v)
        score_grad = weights * (weight_grad - (weight_grad * weights).sum(-1, keepdim=True)) * scale
        grads[0][start:stop] = torch.einsum("hqk,khd->qhd", score_grad, k)
        for whole, part in (
            (grads[1], torch.einsum("hqk,qhd->khd", score_grad, q)),
            (grads[2], torch.einsum("hqk,qhd->khd", weights, g)),
        ):
            whole[key_start:key_stop] = part.unflatten(1, (-1, group)).sum(2)
    first, second, third = grads
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
