"""The losses against their formulas in NumPy, float64, and gradients against finite differences."""

import numpy as np
import pytest
import torch

from cafe.objectives import info_nce, next_token_loss, retrieval_accuracy


def numpy_info_nce(q, t, temperature, negatives=None, ids=None, symmetric=True):
    """The formula, row by row."""
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    q, t = unit(q), unit(t)
    n = len(q)
    ids = np.arange(n) if ids is None else ids
    allowed = lambda i, j: i == j or ids[i] != ids[j]  # noqa: E731
    forward = backward = 0.0
    for i in range(n):
        scores = [q[i] @ t[j] / temperature for j in range(n) if allowed(i, j)]
        if negatives is not None:
            scores += [q[i] @ row / temperature for row in unit(negatives)]
        forward += np.log(np.exp(scores).sum()) - q[i] @ t[i] / temperature
        scores = [q[j] @ t[i] / temperature for j in range(n) if allowed(i, j)]
        backward += np.log(np.exp(scores).sum()) - q[i] @ t[i] / temperature
    return (forward + backward) / (2 * n) if symmetric else forward / n


@pytest.mark.parametrize("negatives", [0, 3])
@pytest.mark.parametrize("duplicated", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_and_its_gradient_match_the_formula(negatives, duplicated, symmetric):
    rng = np.random.default_rng(0)
    q, t = rng.normal(size=(2, 6, 5))
    hard = rng.normal(size=(negatives, 5)) if negatives else None
    ids = np.array([0, 1, 0, 2, 3, 1]) if duplicated else None

    torch_q = torch.tensor(q, requires_grad=True)
    loss = info_nce(
        torch_q,
        torch.tensor(t),
        0.07,
        None if hard is None else torch.tensor(hard),
        None if ids is None else torch.tensor(ids),
        symmetric,
    )
    loss.backward()
    formula = lambda rows: numpy_info_nce(rows, t, 0.07, hard, ids, symmetric)  # noqa: E731
    assert loss.item() == pytest.approx(formula(q), abs=1e-9)

    numeric = np.zeros_like(q)
    for index in np.ndindex(q.shape):
        shift = np.zeros_like(q)
        shift[index] = 1e-6
        numeric[index] = (formula(q + shift) - formula(q - shift)) / 2e-6
    np.testing.assert_allclose(torch_q.grad.numpy(), numeric, atol=1e-6)


def test_info_nce_of_bfloat16_rows_is_computed_in_float32():
    rows = torch.randn(8, 4, dtype=torch.bfloat16)
    assert info_nce(rows, rows).dtype == torch.float32


def test_the_gradients_of_info_nce_are_right_whatever_the_tile():
    torch.manual_seed(0)
    rows = [torch.randn(count, 4, dtype=torch.float64, requires_grad=True) for count in (7, 7, 3)]
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 2, 3, 1, 4])
    for tile in (1, 25, 10**6):
        loss = lambda q, t, n, at, tile=tile: info_nce(q, t, at, n, ids, tile=tile)  # noqa: E731
        assert torch.autograd.gradcheck(loss, (*rows[:2], rows[2], temperature))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tile", [1, 25, 10**6])
def test_next_token_loss_is_cross_entropy_of_the_heads_logits(tile, softcap):
    rng = np.random.default_rng(1)
    hidden, weight, bias = rng.normal(size=(9, 4)), rng.normal(size=(11, 4)), rng.normal(size=11)
    labels = rng.integers(0, 11, size=9)
    logits = hidden @ weight.T + bias
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    expected = sum(np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, labels, strict=True))
    parts = [torch.tensor(part, requires_grad=True) for part in (hidden, weight, bias)]
    loss = lambda h, w, b: next_token_loss(h, torch.tensor(labels), w, b, softcap, tile)  # noqa: E731
    assert loss(*parts).item() == pytest.approx(expected, abs=1e-9)
    assert torch.autograd.gradcheck(loss, parts)


def test_retrieval_accuracy_counts_rows_nearest_to_their_own_match():
    rows = torch.eye(4)
    assert retrieval_accuracy(rows, rows).item() == 1.0
    assert retrieval_accuracy(rows, rows[[1, 0, 2, 3]]).item() == 0.5
