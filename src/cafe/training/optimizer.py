"""AdamW with a learning rate for each part of the model, and its schedule."""

import math
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cafe.families import PartName, part_of
from cafe.training.recipe import OptimizerRecipe


def freeze(lvlm: PreTrainedModel, parts: Sequence[PartName]) -> None:
    """Leaves some parts of a model untrained."""
    for name, parameter in lvlm.named_parameters():
        parameter.requires_grad_(part_of(name, lvlm.config.model_type) not in parts)


def make_optimizer(step: nn.Module, family: str, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """AdamW over a module's trainable parameters, by the part of the family they belong to.

    Vectors and scalars are not decayed.
    """
    own = {
        "vision_tower": recipe.vision_tower_learning_rate,
        "projector": recipe.projector_learning_rate,
        "language_model": recipe.learning_rate,
    }
    rates = {part: recipe.learning_rate if rate is None else rate for part, rate in own.items()}
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}  # sharded and whole ones cannot step together
    for name, parameter in step.named_parameters():
        if parameter.requires_grad:
            rate = rates[part_of(name, family)]
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay, isinstance(parameter, DTensor)), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay, _), group in groups.items()],
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
    )


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets each group's learning rate to so much of its own; returns the highest."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return max(group["lr"] for group in optimizer.param_groups)


def cosine(steps: int, warm_up: float) -> Callable[[int], float]:
    """The learning rate's factor at each step: a straight rise over the warm-up, then a half cosine to zero."""
    rise = max(1, round(steps * warm_up))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))

    return factor


def describe(lvlm: PreTrainedModel) -> str:
    """One line on what is trained: parameters by part, in millions."""
    counts = dict.fromkeys(get_args(PartName), 0)
    for name, parameter in lvlm.named_parameters():
        if parameter.requires_grad:
            part = part_of(name, lvlm.config.model_type)
            counts[part] += parameter.numel()
    trained = [f"{part.replace('_', ' ')} {count / 1e6:.2f}M" for part, count in counts.items() if count]
    return "Training " + ", ".join(trained)
