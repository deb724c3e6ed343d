"""The language-modeling loss against its formula in NumPy (float64), and its gradients against finite differences."""

import numpy as np
import pytest
import torch

from cafe.losses import linear_cross_entropy


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_numel", [1, 25, 10**6])
def test_linear_cross_entropy_and_gradients_match_the_heads_logits(chunk_numel, softcap):
    rng = np.random.default_rng(1)
    hidden, weight, bias = rng.normal(size=(9, 4)), rng.normal(size=(11, 4)), rng.normal(size=11)
    labels = rng.integers(0, 11, size=9)
    logits = hidden @ weight.T + bias
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    expected = sum(np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, labels, strict=True))
    parts = [torch.tensor(part, requires_grad=True) for part in (hidden, weight, bias)]

    def loss(h, w, b):
        return linear_cross_entropy(h, torch.tensor(labels), w, b, softcap, chunk_numel)

    assert loss(*parts).item() == pytest.approx(expected, abs=1e-9)
    assert torch.autograd.gradcheck(loss, parts)


def test_a_loss_factor_beyond_float16_gives_finite_gradients():
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(12, 8), 1e-3 * torch.randn(20, 8), torch.randint(20, (12,))
    grads = []
    for dtype in (torch.float32, torch.float16):
        rows = hidden.to(dtype).detach().requires_grad_()
        (2.0**20 * linear_cross_entropy(rows, labels, weight)).backward()
        grads.append(rows.grad.float())
    assert (grads[1] - grads[0]).norm() < 2e-3 * grads[0].norm()
