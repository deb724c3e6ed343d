"""The losses against their formulas in NumPy, float64, and gradients against finite differences."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cafe.losses import in_batch_accuracy, info_nce, linear_cross_entropy, matryoshka


def numpy_info_nce(q, t, temperature, negatives=None, ids=None, symmetric=True, hardness=0.0, margin=None, fixed=None):
    """The formula, row by row; weights and who is a negative are taken at `fixed` and do not move with q and t."""
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    held_q, held_t = map(unit, fixed or (q, t))
    q, t = unit(q), unit(t)
    hard = unit(negatives) if negatives is not None else np.empty((0, q.shape[1]))
    n = len(q)
    ids = np.arange(n) if ids is None else ids

    def term(cosine, held, match):
        """What one negative adds to the denominator, given its cosine and that of the match, both held."""
        if margin is not None and held > match + margin:
            return 0.0
        return np.exp(cosine / temperature) * np.exp(hardness * held)

    forward = backward = 0.0
    for i in range(n):
        match, held = q[i] @ t[i], held_q[i] @ held_t[i]
        others = [j for j in range(n) if ids[i] != ids[j]]
        row = sum(term(q[i] @ t[j], held_q[i] @ held_t[j], held) for j in others)
        row += sum(term(q[i] @ one, held_q[i] @ one, held) for one in hard)
        column = sum(term(q[j] @ t[i], held_q[j] @ held_t[i], held) for j in others)
        forward += np.log(np.exp(match / temperature) + row) - match / temperature
        backward += np.log(np.exp(match / temperature) + column) - match / temperature
    return (forward + backward) / (2 * n) if symmetric else forward / n


@pytest.mark.parametrize("symmetric", [False, True])
def test_negatives_that_match_in_part_are_soft_targets(symmetric):
    rng = np.random.default_rng(0)
    q, t, hard = rng.normal(size=(4, 5)), rng.normal(size=(4, 5)), rng.normal(size=(5, 5))
    owners, scores = np.array([0, 0, 2, 3, 3]), np.array([0.5, 0.0, 1.0, 0.2, 0.8])

    def formula(a=q, b=t, c=hard, at=0.07):
        unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
        logits = unit(a) @ np.concatenate([unit(b), unit(c)]).T / at
        wanted = np.concatenate([np.eye(4), scores * (owners == np.arange(4)[:, None])], axis=1)
        wanted /= wanted.sum(1, keepdims=True)
        chances = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        forward = -(wanted * chances).sum(1).mean()
        columns = logits[:, :4] - np.log(np.exp(logits[:, :4]).sum(0))
        return (forward - np.diag(columns).mean()) / 2 if symmetric else forward

    rows = [torch.tensor(each, requires_grad=True) for each in (q, t, hard)]
    temperature = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    more = {"owners": torch.tensor(owners), "scores": torch.tensor(scores), "symmetric": symmetric}
    loss = info_nce(rows[0], rows[1], temperature, rows[2], **more, tile=18)
    loss.backward()
    assert loss.item() == pytest.approx(formula(), abs=1e-9)
    for name, tensor in zip("abc", rows, strict=True):
        numeric = numpy_gradient(lambda moved, name=name: formula(**{name: moved}), tensor.detach().numpy())
        np.testing.assert_allclose(tensor.grad.numpy(), numeric, atol=1e-6)
    by_temperature = (formula(at=0.07 + 1e-6) - formula(at=0.07 - 1e-6)) / 2e-6
    assert temperature.grad.item() == pytest.approx(by_temperature, abs=1e-5)


def numpy_gradient(formula, rows):
    """By finite differences."""
    numeric = np.zeros_like(rows)
    for index in np.ndindex(rows.shape):
        shift = np.zeros_like(rows)
        shift[index] = 1e-6
        numeric[index] = (formula(rows + shift) - formula(rows - shift)) / 2e-6
    return numeric


@pytest.mark.parametrize("negatives", [0, 3])
@pytest.mark.parametrize("duplicated", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("hardness", "margin"), [(0.0, None), (3.0, None), (0.0, 0.1), (3.0, -0.1)])
def test_info_nce_and_its_gradient_match_the_formula(negatives, duplicated, symmetric, hardness, margin):
    rng = np.random.default_rng(0)
    q, t = rng.normal(size=(2, 6, 5))
    hard = rng.normal(size=(negatives, 5)) if negatives else None
    ids = np.array([0, 1, 0, 2, 3, 1]) if duplicated else None
    more = {"symmetric": symmetric, "hardness": hardness, "margin": margin}
    temperature = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    torch_q, torch_t = torch.tensor(q, requires_grad=True), torch.tensor(t, requires_grad=True)
    torch_hard = None if hard is None else torch.tensor(hard, requires_grad=True)
    loss = info_nce(
        torch_q, torch_t, temperature, torch_hard, None if ids is None else torch.tensor(ids), tile=18, **more
    )
    loss.backward()

    def formula(a=q, b=t, c=hard, at=0.07):
        # What is held is the queries' and targets' own; the hard negatives' shift is too small to change a mask.
        return numpy_info_nce(a, b, at, c, ids, fixed=(q, t), **more)

    assert loss.item() == pytest.approx(formula(), abs=1e-9)
    np.testing.assert_allclose(torch_q.grad.numpy(), numpy_gradient(lambda rows: formula(a=rows), q), atol=1e-6)
    np.testing.assert_allclose(torch_t.grad.numpy(), numpy_gradient(lambda rows: formula(b=rows), t), atol=1e-6)
    by_temperature = (formula(at=0.07 + 1e-6) - formula(at=0.07 - 1e-6)) / 2e-6
    assert temperature.grad.item() == pytest.approx(by_temperature, abs=1e-5)
    if hard is not None and not hardness:
        np.testing.assert_allclose(
            torch_hard.grad.numpy(), numpy_gradient(lambda rows: formula(c=rows), hard), atol=1e-6
        )


def test_a_hard_negative_equal_to_a_target_is_no_negative_of_its_query():
    rng = np.random.default_rng(0)
    q, t, hard = (torch.tensor(rng.normal(size=(rows, 5))) for rows in (3, 3, 2))
    hard[0] = t[1]  # found for another pair
    ids = torch.tensor([7, 8, 9, 8, 5])
    loss = info_nce(q, t, 0.07, hard, target_ids=ids, symmetric=False)
    unit = [torch.nn.functional.normalize(rows, dim=1) for rows in (q, t, hard)]
    logits = unit[0] @ torch.cat(unit[1:]).T / 0.07
    logits[1, 3] = -torch.inf
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.arange(3)).item(), rel=1e-9)


def test_a_margin_leaves_out_what_resembles_the_match_too_much_and_nothing_else():
    rng = np.random.default_rng(0)
    q, t = rng.normal(size=(2, 6, 5))
    value = lambda margin: info_nce(torch.tensor(q), torch.tensor(t), 0.07, margin=margin).item()  # noqa: E731
    assert value(2.0) == value(None)  # no cosine is more than 2 above another
    assert value(0.0) < value(0.5) < value(None)
    assert value(-2.0) == pytest.approx(0.0, abs=1e-12)  # nothing is left but the matches


def test_a_matryoshka_loss_is_the_weighted_mean_over_prefixes():
    rng = np.random.default_rng(0)
    q, t, hard = rng.normal(size=(6, 8)), rng.normal(size=(6, 8)), rng.normal(size=(3, 8))
    torch_q = torch.tensor(q, requires_grad=True)
    loss = matryoshka({2: 0.5, 4: 2.0}, torch_q, torch.tensor(t), 0.07, torch.tensor(hard), symmetric=False)
    loss.backward()

    def formula(rows):
        parts = {2: 0.5, 4: 2.0, 8: 1.0}
        each = [w * numpy_info_nce(rows[:, :d], t[:, :d], 0.07, hard[:, :d], symmetric=False) for d, w in parts.items()]
        return sum(each) / sum(parts.values())

    assert loss.item() == pytest.approx(formula(q), abs=1e-9)
    np.testing.assert_allclose(torch_q.grad.numpy(), numpy_gradient(formula, q), atol=1e-6)
    plain = info_nce(torch_q, torch.tensor(t), 0.07, torch.tensor(hard))
    assert matryoshka({}, torch_q, torch.tensor(t), 0.07, torch.tensor(hard)).item() == plain.item()


def test_the_memory_of_info_nce_grows_with_the_pairs_and_not_with_their_square():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            made = function(*arguments, **(named or {}))
            self.size = max(
                [self.size, *(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))]
            )
            return made

    for pairs in (256, 1024):
        rows = [torch.randn(pairs, 4, requires_grad=True) for _ in range(2)]
        with Largest() as largest:
            info_nce(*rows, 0.07, hardness=2.0, margin=0.1, tile=2048).backward()
        assert largest.size <= max(2048, 4 * pairs)


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
    loss = lambda h, w, b: linear_cross_entropy(h, torch.tensor(labels), w, b, softcap, tile)  # noqa: E731
    assert loss(*parts).item() == pytest.approx(expected, abs=1e-9)
    assert torch.autograd.gradcheck(loss, parts)


def test_a_share_of_next_token_loss_may_be_larger_than_float16_holds():
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(12, 8), 1e-3 * torch.randn(20, 8), torch.randint(20, (12,))
    grads = []
    for dtype in (torch.float32, torch.float16):
        rows = hidden.to(dtype).detach().requires_grad_()
        (2.0**20 * linear_cross_entropy(rows, labels, weight)).backward()
        grads.append(rows.grad.float())
    assert (grads[1] - grads[0]).norm() < 2e-3 * grads[0].norm()


def test_retrieval_accuracy_counts_rows_nearest_to_their_own_match():
    rows = torch.eye(4)
    assert in_batch_accuracy(rows, rows).item() == 1.0
    assert in_batch_accuracy(rows, rows[[1, 0, 2, 3]]).item() == 0.5
