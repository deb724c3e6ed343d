"""The language-modeling loss, computed from hidden states without holding the logits of all tokens."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

HEAD_CHUNK_NUMEL = 32 * 2**20  # logits of the language-model head computed at once: 128 MiB in float32


def linear_cross_entropy(
    hidden: Float[Tensor, "supervised dim"],
    labels: Int64[Tensor, " supervised"],
    weight: Float[Tensor, "vocabulary dim"],
    bias: Float[Tensor, " vocabulary"] | None = None,
    softcap: float | None = None,
    chunk_numel: int = HEAD_CHUNK_NUMEL,
) -> Float[Tensor, ""]:
    """Compute the next-token cross-entropy, summed over the supervised tokens.

    Divide it by the number of supervised tokens of the whole contrastive batch, over all micro-batches and ranks: then
    the parts add up to the mean over tokens and not to a mean of means.

    The head runs on chunks of tokens and the gradient of a chunk is computed at once, so the logits of all tokens are
    never held and never computed twice. Liger's kernel (arXiv 2410.10989) does the same and takes longer on an H200:
    see `benchmarks/language_head.py`.

    Args:
        hidden: the last hidden states that predict the supervised tokens.
        labels: the supervised tokens.
        weight: the weight of the language-model head.
        bias: the bias of the head, if it has one.
        softcap: replace logits by softcap * tanh(logits / softcap), as some families do.
        chunk_numel: logits computed at once.
    """
    if not torch.is_grad_enabled():  # inside a Function, `needs_input_grad` ignores `no_grad`
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    loss: Tensor = _LinearCrossEntropy.apply(hidden, labels, weight, bias, softcap, chunk_numel)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Compute the cross-entropy of a linear head, and its gradients in the forward pass already."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "supervised dim"],
        labels: Int64[Tensor, " supervised"],
        weight: Float[Tensor, "vocabulary dim"],
        bias: Float[Tensor, " vocabulary"] | None,
        softcap: float | None,
        chunk_numel: int,
    ) -> Float[Tensor, ""]:
        """Compute the loss and, chunk by chunk, the gradients that are needed."""
        loss_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = weight.to(hidden.dtype)
        needs_hidden, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if bias is not None and needs_bias else None
        loss = torch.zeros((), dtype=loss_dtype, device=hidden.device)

        step = max(1, chunk_numel // len(weight))
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            # The product runs in the precision of the model, all that follows in that of the loss.
            logits = (hidden[rows] @ head.T).to(loss_dtype)
            if bias is not None:
                logits += bias
            if softcap is not None:
                squashed = torch.tanh(logits / softcap)
                logits = softcap * squashed
            chunk_labels = labels[rows, None]
            log_probs = logits.log_softmax(-1)
            loss -= log_probs.gather(1, chunk_labels).sum()
            if not any(ctx.needs_input_grad):
                continue

            # Gradient of the logits: softmax minus one-hot, in place of the log-probabilities.
            grad = log_probs.exp_().scatter_add_(1, chunk_labels, log_probs.new_full(chunk_labels.shape, -1.0))
            if softcap is not None:
                grad *= 1 - squashed**2  # the derivative of softcap * tanh(logits / softcap)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)  # back to the precision of the model for the large products
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ head
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass computed."""
        [grad_loss] = grads
        scaled: list[Tensor | None] = []
        for grad in ctx.saved_tensors:
            # Multiply in the precision of the loss: float16 holds neither a small factor nor a scaled gradient.
            scaled.append(None if grad is None else (grad.to(grad_loss.dtype) * grad_loss).to(grad.dtype))
        grad_hidden, grad_weight, grad_bias = scaled
        return grad_hidden, None, grad_weight, grad_bias, None, None
