"""Optimizers by name: each goes the way of AdamW, or of its own reference, and one whose package lacks is refused."""

from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from cafe.errors import CafeError
from cafe.model import Cafe
from cafe.training.optimizer import configure_trainable_parameters, make_optimizer
from cafe.training.recipe import ModelConfig, OptimizerConfig

NAMES = get_args(get_type_hints(OptimizerConfig)["name"])


def run(name: str, steps: int = 20) -> tuple[torch.Tensor, float, float]:
    """A linear layer's weights after some steps towards another's; its loss before and after."""
    torch.manual_seed(0)
    layer, wanted, rows = nn.Linear(128, 64), torch.randn(64, 128) / 8, torch.randn(256, 128)
    optimizer = make_optimizer(layer, "llava", OptimizerConfig(name=name, learning_rate=1e-2, beta2=0.99))
    losses = []
    for _ in range(steps):
        loss = (layer(rows) - rows @ wanted.T).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer.weight.detach(), losses[0], losses[-1]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_the_loss_and_adamws_kind_goes_adamws_way(name):
    weights, before, after = run(name)
    assert after < before / 2
    if "adamw" in name:
        expected, *_ = run("adamw")
        assert (weights - expected).norm() <= 0.05 * expected.norm()


def test_one_whose_package_is_not_installed_is_refused_by_a_sentence(monkeypatch):
    monkeypatch.setattr("cafe.training.optimizer.find_spec", lambda name: None)
    with pytest.raises(CafeError, match=r"optimizer\.name: paged_adamw_8bit needs the package bitsandbytes"):
        make_optimizer(nn.Linear(2, 2), "llava", OptimizerConfig(name="paged_adamw_8bit"))


def test_a_model_whose_layers_cannot_be_made_again_is_named(random_base):
    lvlm = Cafe.load(random_base).lvlm
    lvlm.supports_gradient_checkpointing = False
    with pytest.raises(CafeError, match=r"gradient_checkpointing: a llava_onevision model cannot"):
        configure_trainable_parameters(lvlm, ModelConfig(base="", gradient_checkpointing=True))
