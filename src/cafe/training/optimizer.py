"""AdamW with a learning rate for each part of the model, its schedule, and the gradient norm of each objective."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from cafe.families import part_of
from cafe.training.recipe import OptimizerRecipe


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
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in step.named_parameters():
        if parameter.requires_grad:
            rate = rates[part_of(name, family)]
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()],
        betas=(recipe.beta1, recipe.beta2),
    )


def cosine(steps: int, warm_up: float) -> Callable[[int], float]:
    """The learning rate's factor at each step: a straight rise over the warm-up, then a half cosine to zero."""
    rise = max(1, round(steps * warm_up))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))

    return factor


def objective_norms(losses: dict[str, Float[Tensor, ""]], parameters: list[nn.Parameter]) -> dict[str, float]:
    """The norm of each loss's own gradient, before weighting and clipping, as `grad_norm_` and the loss's name."""
    norms = {}
    for name, loss in losses.items():
        grads: tuple[Tensor | None, ...] = ()
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        squares = [grad.float().square().sum().item() for grad in grads if grad is not None]
        norms[f"grad_norm_{name}"] = math.sqrt(sum(squares))
    return norms


def describe(lvlm: PreTrainedModel) -> str:
    """One line on what is trained: parameters by part, in millions."""
    counts: dict[str, int] = {}
    for name, parameter in lvlm.named_parameters():
        if parameter.requires_grad:
            part = part_of(name, lvlm.config.model_type)
            counts[part] = counts.get(part, 0) + parameter.numel()
    return "Training " + ", ".join(f"{part.replace('_', ' ')} {count / 1e6:.2f}M" for part, count in counts.items())
