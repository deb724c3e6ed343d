"""The language-modeling loss, as a pure tensor function: no model, no file, no rank."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

HEAD_CHUNK_NUMEL = 32 * 2**20  # logits of the language head computed at once: 128 MiB


def linear_cross_entropy(
    hidden: Float[Tensor, "supervised dim"],
    labels: Int64[Tensor, " supervised"],
    weight: Float[Tensor, "vocabulary dim"],
    bias: Float[Tensor, " vocabulary"] | None = None,
    softcap: float | None = None,
    tile: int = HEAD_CHUNK_NUMEL,
) -> Float[Tensor, ""]:
    """Next-token cross-entropy, summed over the supervised tokens.

    Divide by the number of supervised tokens of the whole contrastive batch, over all micro-batches and ranks: then the
    parts add up to the mean over tokens and not to a mean of means.

    The head runs on the tokens that predict something, and on some of them at a time; their gradient is taken at once,
    so that the logits of all are never held and never computed twice. Liger's kernel (arXiv 2410.10989) does the same,
    and on an H200 takes longer: `benchmarks/language_head.py`.

    Args:
        hidden: the last hidden state of the token before each supervised one.
        labels: the supervised tokens.
        weight, bias: of the language-model head.
        softcap: logits become softcap * tanh(logits / softcap), where the family does so.
        tile: logits computed at once.
    """
    if not torch.is_grad_enabled():  # of which a Function is not told
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    loss: Tensor = _LinearCrossEntropy.apply(hidden, labels, weight, bias, softcap, tile)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        tile: int,
    ) -> Tensor:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = weight.to(hidden.dtype)
        needs_hidden, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if bias is not None and needs_bias else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        step = max(1, tile // len(weight))
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            logits = (hidden[rows] @ head.T).to(exact)
            if bias is not None:
                logits += bias
            if softcap is not None:
                squashed = torch.tanh(logits / softcap)
                logits = softcap * squashed
            wanted = labels[rows, None]
            shares = logits.log_softmax(-1)
            total -= shares.gather(1, wanted).sum()
            if any(ctx.needs_input_grad):
                grad = shares.exp_().scatter_add_(1, wanted, shares.new_full(wanted.shape, -1.0))
                if softcap is not None:
                    grad *= 1 - squashed**2
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad @ head
                if grad_weight is not None:
                    grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [factor] = grads  # in float32 at least: float16 would hold neither a small share of a loss nor a scaled one
        hidden, weight, bias = (
            None if grad is None else (grad.to(factor.dtype) * factor).to(grad.dtype) for grad in ctx.saved_tensors
        )
        return hidden, None, weight, bias, None, None
