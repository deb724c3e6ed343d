"""The contrastive loss against its formula in NumPy (float64), and its gradients against finite differences."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cafe.losses import ContrastiveConfig, in_batch_accuracy, info_nce


def normalize(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def numpy_info_nce(q, t, temperature, negatives=None, ids=None, symmetric=True, hardness=0.0, margin=None, fixed=None):
    """Compute the formula row by row. Weights and masks are taken at `fixed` and do not move with q and t."""
    held_q, held_t = map(normalize, fixed or (q, t))
    q, t = normalize(q), normalize(t)
    hard = normalize(negatives) if negatives is not None else np.empty((0, q.shape[1]))
    n = len(q)
    ids = np.arange(n) if ids is None else ids

    def term(cosine, held, match):
        """What one negative adds to the denominator, given its cosine and that of the match, both held constant."""
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
def test_hard_negatives_that_may_match_are_soft_labels(symmetric):
    rng = np.random.default_rng(0)
    q, t, hard = rng.normal(size=(4, 5)), rng.normal(size=(4, 5)), rng.normal(size=(5, 5))
    owner, match_prob = np.array([0, 0, 2, 3, 3]), np.array([0.5, 0.0, 1.0, 0.2, 0.8])

    def formula(a=q, b=t, c=hard, at=0.07):
        logits = normalize(a) @ np.concatenate([normalize(b), normalize(c)]).T / at
        labels = np.concatenate([np.eye(4), match_prob * (owner == np.arange(4)[:, None])], axis=1)
        labels /= labels.sum(1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        forward = -(labels * log_probs).sum(1).mean()
        columns = logits[:, :4] - np.log(np.exp(logits[:, :4]).sum(0))
        return (forward - np.diag(columns).mean()) / 2 if symmetric else forward

    rows = [torch.tensor(each, requires_grad=True) for each in (q, t, hard)]
    temperature = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    loss = info_nce(
        *rows[:2],
        temperature,
        rows[2],
        negative_owner=torch.tensor(owner),
        negative_match_prob=torch.tensor(match_prob),
        config=ContrastiveConfig(symmetric=symmetric),
        chunk_numel=18,
    )
    loss.backward()
    assert loss.item() == pytest.approx(formula(), abs=1e-9)
    for name, tensor in zip("abc", rows, strict=True):
        numeric = numpy_gradient(lambda moved, name=name: formula(**{name: moved}), tensor.detach().numpy())
        np.testing.assert_allclose(tensor.grad.numpy(), numeric, atol=1e-6)
    by_temperature = (formula(at=0.07 + 1e-6) - formula(at=0.07 - 1e-6)) / 2e-6
    assert temperature.grad.item() == pytest.approx(by_temperature, abs=1e-5)


def numpy_gradient(formula, rows):
    """Compute the gradient by central finite differences."""
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
    config = ContrastiveConfig(symmetric=symmetric, hardness_weight=hardness, false_negative_margin=margin)
    temperature = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    torch_q, torch_t = torch.tensor(q, requires_grad=True), torch.tensor(t, requires_grad=True)
    torch_hard = None if hard is None else torch.tensor(hard, requires_grad=True)
    target_ids = None if ids is None else torch.tensor(ids)
    loss = info_nce(torch_q, torch_t, temperature, torch_hard, target_ids=target_ids, config=config, chunk_numel=18)
    loss.backward()

    def formula(a=q, b=t, c=hard, at=0.07):
        # Weights and masks of queries and targets are held; a hard negative moves too little to change a mask.
        return numpy_info_nce(a, b, at, c, ids, symmetric, hardness, margin, fixed=(q, t))

    assert loss.item() == pytest.approx(formula(), abs=1e-9)
    np.testing.assert_allclose(torch_q.grad.numpy(), numpy_gradient(lambda rows: formula(a=rows), q), atol=1e-6)
    np.testing.assert_allclose(torch_t.grad.numpy(), numpy_gradient(lambda rows: formula(b=rows), t), atol=1e-6)
    by_temperature = (formula(at=0.07 + 1e-6) - formula(at=0.07 - 1e-6)) / 2e-6
    assert temperature.grad.item() == pytest.approx(by_temperature, abs=1e-5)
    if hard is not None and not hardness:
        np.testing.assert_allclose(
            torch_hard.grad.numpy(), numpy_gradient(lambda rows: formula(c=rows), hard), atol=1e-6
        )


def test_a_hard_negative_that_duplicates_a_target_is_masked_for_its_query():
    rng = np.random.default_rng(0)
    q, t, hard = (torch.tensor(rng.normal(size=(rows, 5))) for rows in (3, 3, 2))
    hard[0] = t[1]  # mined for another pair
    ids = torch.tensor([7, 8, 9, 8, 5])
    loss = info_nce(q, t, 0.07, hard, target_ids=ids, config=ContrastiveConfig(symmetric=False))
    unit = [torch.nn.functional.normalize(rows, dim=1) for rows in (q, t, hard)]
    logits = unit[0] @ torch.cat(unit[1:]).T / 0.07
    logits[1, 3] = -torch.inf
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.arange(3)).item(), rel=1e-9)


def numpy_masked_info_nce(q, t, temperature, hard, query_ids, ids):
    """Compute the formula over the dense matrix, without the negatives that any pair of the batch holds."""
    pairs = set(zip(query_ids.tolist(), ids[: len(q)].tolist(), strict=True))
    logits = normalize(q) @ normalize(np.concatenate([t, hard])).T / temperature
    for i, j in np.ndindex(logits.shape):
        if i != j and (query_ids[i], ids[j]) in pairs:
            logits[i, j] = -np.inf
    match = np.diag(logits)
    forward = np.log(np.exp(logits).sum(1)) - match
    backward = np.log(np.exp(logits[:, : len(q)]).sum(0)) - match
    return (forward.mean() + backward.mean()) / 2


@pytest.mark.parametrize("chunk_numel", [1, 20, 10**6])
def test_equal_queries_are_no_negatives_of_each_other_in_either_direction(chunk_numel):
    rng = np.random.default_rng(0)
    q, t, hard = rng.normal(size=(6, 5)), rng.normal(size=(6, 5)), rng.normal(size=(3, 5))
    query_ids = np.array([7, 8, 7, 9, 8, 5])
    # The fourth target is that of the third pair; a hard negative is another target of its own query.
    ids = np.array([0, 1, 2, 2, 4, 5, 4, 8, 0])
    rows = [torch.tensor(each, requires_grad=True) for each in (q, t, hard)]
    tensors = {"query_ids": torch.tensor(query_ids), "target_ids": torch.tensor(ids)}
    loss = info_nce(*rows[:2], 0.07, rows[2], **tensors, chunk_numel=chunk_numel)
    loss.backward()

    def formula(a=q, b=t, c=hard):
        return numpy_masked_info_nce(a, b, 0.07, c, query_ids, ids)

    assert loss.item() == pytest.approx(formula(), abs=1e-9)
    for name, row in zip("abc", rows, strict=True):
        numeric = numpy_gradient(lambda moved, name=name: formula(**{name: moved}), row.detach().numpy())
        np.testing.assert_allclose(row.grad.numpy(), numeric, atol=1e-6)
    unmasked = info_nce(*rows[:2], 0.07, rows[2], **tensors, config=ContrastiveConfig(mask_duplicates=False))
    assert unmasked.item() == pytest.approx(numpy_info_nce(q, t, 0.07, hard), abs=1e-9)


def test_a_caption_of_the_same_image_masks_as_the_formula_says():
    """Four images with two captions each, a row a caption: each row has six negatives in each direction, not seven."""
    rng = np.random.default_rng(1)
    q, t = np.repeat(rng.normal(size=(4, 5)), 2, axis=0), rng.normal(size=(8, 5))
    logits = normalize(q) @ normalize(t).T / 0.05
    logits[np.arange(8), np.arange(8) ^ 1] = -np.inf
    both = [np.log(np.exp(logits).sum(axis)) - np.diag(logits) for axis in (0, 1)]
    loss = info_nce(torch.tensor(q), torch.tensor(t), 0.05, query_ids=torch.arange(8) // 2)
    assert loss.item() == pytest.approx(np.mean(both), abs=1e-9)


def test_false_negative_margin_masks_only_negatives_above_it():
    rng = np.random.default_rng(0)
    q, t = rng.normal(size=(2, 6, 5))

    def value(margin):
        config = ContrastiveConfig(false_negative_margin=margin)
        return info_nce(torch.tensor(q), torch.tensor(t), 0.07, config=config).item()

    assert value(2.0) == value(None)  # no cosine is more than 2 above another
    assert value(0.0) < value(0.5) < value(None)
    assert value(-2.0) == pytest.approx(0.0, abs=1e-12)  # only the matches are left


def test_matryoshka_is_the_weighted_mean_over_leading_dimensions():
    rng = np.random.default_rng(0)
    q, t, hard = rng.normal(size=(6, 8)), rng.normal(size=(6, 8)), rng.normal(size=(3, 8))
    torch_q = torch.tensor(q, requires_grad=True)
    config = ContrastiveConfig(symmetric=False, dim_weights={2: 0.5, 4: 2.0})
    loss = info_nce(torch_q, torch.tensor(t), 0.07, torch.tensor(hard), config=config)
    loss.backward()

    def formula(rows):
        weights = {2: 0.5, 4: 2.0, 8: 1.0}
        losses = [
            weight * numpy_info_nce(rows[:, :dim], t[:, :dim], 0.07, hard[:, :dim], symmetric=False)
            for dim, weight in weights.items()
        ]
        return sum(losses) / sum(weights.values())

    assert loss.item() == pytest.approx(formula(q), abs=1e-9)
    np.testing.assert_allclose(torch_q.grad.numpy(), numpy_gradient(formula, q), atol=1e-6)
    plain = info_nce(torch_q, torch.tensor(t), 0.07, torch.tensor(hard))
    assert plain.item() == pytest.approx(numpy_info_nce(q, t, 0.07, hard), abs=1e-9)  # the default has no more dims


def test_duplicate_ids_are_ignored_unless_duplicates_are_masked():
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 0, 1, 1])
    config = ContrastiveConfig(mask_duplicates=False)
    loss = info_nce(rows, rows.flip(0), target_ids=ids, config=config)
    assert loss.item() == info_nce(rows, rows.flip(0)).item() != info_nce(rows, rows.flip(0), target_ids=ids).item()


def test_info_nce_memory_is_linear_in_the_number_of_pairs():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.size = max([self.size, *(tensor.numel() for tensor in tensors)])
            return result

    config = ContrastiveConfig(hardness_weight=2.0, false_negative_margin=0.1)
    for pairs in (256, 1024):
        rows = [torch.randn(pairs, 4, requires_grad=True) for _ in range(2)]
        with Largest() as largest:
            info_nce(*rows, 0.07, config=config, chunk_numel=2048).backward()
        assert largest.size <= max(2048, 4 * pairs)


def test_info_nce_of_bfloat16_rows_is_computed_in_float32():
    rows = torch.randn(8, 4, dtype=torch.bfloat16)
    assert info_nce(rows, rows).dtype == torch.float32


def test_info_nce_gradients_are_right_for_any_chunk_size():
    torch.manual_seed(0)
    rows = [torch.randn(count, 4, dtype=torch.float64, requires_grad=True) for count in (7, 7, 3)]
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 2, 3, 1, 4])
    for chunk_numel in (1, 25, 10**6):

        def loss(q, t, n, at, chunk_numel=chunk_numel):
            return info_nce(q, t, at, n, target_ids=ids, chunk_numel=chunk_numel)

        assert torch.autograd.gradcheck(loss, (*rows, temperature))


def test_in_batch_accuracy_counts_rows_nearest_to_their_own_match():
    rows = torch.eye(4)
    assert in_batch_accuracy(rows, rows).item() == 1.0
    assert in_batch_accuracy(rows, rows[[1, 0, 2, 3]]).item() == 0.5
    # The second query is the first one's equal: the target that it is nearest to is its match as well.
    equal = torch.tensor([0, 0, 1, 2])
    assert in_batch_accuracy(rows, rows[[1, 0, 2, 3]], query_ids=equal).item() == 1.0
    assert in_batch_accuracy(rows, rows[[1, 0, 2, 3]], target_ids=equal).item() == 1.0
