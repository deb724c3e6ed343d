"""Every optimizer lowers the loss, follows AdamW or its own reference, and names the package that it lacks."""

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
    """Fit a linear layer to another; return its weights, and the loss before and after."""
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
def test_every_optimizer_lowers_the_loss_and_adamw_variants_follow_adamw(name):
    weights, before, after = run(name)
    assert after < before / 2
    if "adamw" in name:
        expected, *_ = run("adamw")
        assert (weights - expected).norm() <= 0.05 * expected.norm()


def test_optimizer_with_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("cafe.training.optimizer.find_spec", lambda name: None)
    with pytest.raises(CafeError, match=r"optimizer\.name: paged_adamw_8bit needs the package bitsandbytes"):
        make_optimizer(nn.Linear(2, 2), "llava", OptimizerConfig(name="paged_adamw_8bit"))


def test_model_without_gradient_checkpointing_is_named(random_base):
    lvlm = Cafe.load(random_base).lvlm
    lvlm.supports_gradient_checkpointing = False
    with pytest.raises(CafeError, match=r"gradient_checkpointing: a llava_onevision model does not support it"):
        configure_trainable_parameters(lvlm, ModelConfig(base="", gradient_checkpointing=True))
