"""Muon against PyTorch's own, and against the singular value decomposition."""

import pytest
import torch

from cafe.model import Cafe
from cafe.training.muon import Muon, hidden_weight_names, newton_schulz


@pytest.mark.parametrize("shape", [(3, 8, 24), (2, 24, 8)])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_singular_vectors(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = newton_schulz(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ made @ right.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    torch.testing.assert_close(values, torch.diag_embed(diagonal), atol=1e-4, rtol=0)


def test_muon_steps_are_those_of_pytorch():
    torch.manual_seed(0)
    start = [torch.randn(16, 32), torch.randn(32, 16), torch.randn(16, 32)]
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    biases = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizers = [
        Muon([{"params": ours, "orthogonal": True}, {"params": biases[:1]}], lr=0.01, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(biases[1:], lr=0.01, weight_decay=0.1),
    ]
    for _ in range(3):
        for one, other in zip([*ours, biases[0]], [*theirs, biases[1]], strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for before, one, other in zip(start, ours, theirs, strict=True):
        moved, expected = one.detach() - before, other.detach() - before
        assert (moved - expected).norm() < 0.02 * expected.norm()  # theirs iterates in bfloat16
    assert torch.equal(*biases)


def test_muon_state_dict_is_loaded_again():
    matrix = torch.nn.Parameter(torch.randn(4, 8))
    groups = [{"params": [matrix], "orthogonal": True}]
    first = Muon(groups, lr=0.01)
    matrix.grad = torch.randn(4, 8)
    first.step()
    second = Muon(groups, lr=0.01)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[matrix]["momentum"], first.state[matrix]["momentum"])


def test_hidden_weights_are_those_of_linear_layers_but_the_head(random_base):
    lvlm = Cafe.load(random_base).lvlm
    inner = hidden_weight_names(lvlm)
    for name, parameter in lvlm.named_parameters():
        assert (name in inner) == (parameter.ndim == 2 and "embed" not in name and "lm_head" not in name), name
