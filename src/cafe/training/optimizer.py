"""The optimizer, with a learning rate for each part of the model, and its schedule."""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cafe.errors import CafeError
from cafe.lvlm.adapters import add_adapter
from cafe.lvlm.families import PartName, model_part
from cafe.training.muon import Muon, hidden_weight_names
from cafe.training.recipe import AUTOCAST_DTYPES, ModelConfig, OptimizerConfig


def configure_trainable_parameters(lvlm: PreTrainedModel, recipe: ModelConfig) -> None:
    """Leaves untrained what the recipe does not train, and holds it in the precision that the recipe names.

    Layers are made again for the backward pass where it says so.
    """
    if recipe.gradient_checkpointing:
        enable_gradient_checkpointing(lvlm)
    if recipe.adapter:
        add_adapter(lvlm, recipe.adapter)
    else:
        freeze(lvlm, recipe.freeze)
    if recipe.frozen_weights_dtype in AUTOCAST_DTYPES:
        for parameter in lvlm.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(AUTOCAST_DTYPES[recipe.frozen_weights_dtype])


def enable_gradient_checkpointing(lvlm: PreTrainedModel) -> None:
    """Makes layers keep no activations, but make them again for the backward pass.

    Raises:
        CafeError: the model cannot.
    """
    if not lvlm.supports_gradient_checkpointing:
        raise CafeError(f"model.gradient_checkpointing: a {lvlm.config.model_type} model cannot do it.")
    older = lvlm.gradient_checkpointing_enable  # the only name in transformers 5.10, and deprecated in 5.23
    getattr(lvlm, "activation_checkpointing_enable", older)()


def freeze(lvlm: PreTrainedModel, parts: Sequence[PartName]) -> None:
    """Leaves some parts of a model untrained."""
    for name, parameter in lvlm.named_parameters():
        parameter.requires_grad_(model_part(name, lvlm.config.model_type) not in parts)


def make_optimizer(step: nn.Module, family: str, recipe: OptimizerConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer over a module's trainable parameters, by the part of the family they belong to.

    Vectors and scalars are not decayed.

    Raises:
        CafeError: it needs a package that is not installed.
    """
    own = {
        "vision_tower": recipe.vision_tower_learning_rate,
        "projector": recipe.projector_learning_rate,
        "language_model": recipe.learning_rate,
    }
    rates = {part: recipe.learning_rate if rate is None else rate for part, rate in own.items()}
    inner = hidden_weight_names(step) if recipe.name == "muon" else set()
    groups: dict[tuple[float, float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in step.named_parameters():
        if parameter.requires_grad:
            rate = rates[model_part(name, family)]
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            sharded = isinstance(parameter, DTensor)  # sharded and whole ones cannot step together
            groups.setdefault((rate, decay, name in inner, sharded), []).append(parameter)
    parameters = [
        {"params": group, "lr": rate, "weight_decay": decay, "orthogonal": matrices}
        for (rate, decay, matrices, _), group in groups.items()
    ]
    betas = recipe.beta1, recipe.beta2
    if recipe.name != "adamw" and any(sharded for *_, sharded in groups):
        raise CafeError(f"optimizer.name: {recipe.name} does not go with model.shard; adamw does.")
    if recipe.name == "adamw":
        return torch.optim.AdamW(parameters, betas=betas, eps=recipe.epsilon, fused=True)
    if recipe.name == "muon":
        return Muon(parameters, betas=betas, eps=recipe.epsilon)
    if recipe.name == "adafactor":  # with the learning rate that it is given, not one of its own making
        from transformers import Adafactor  # brings peft along, which takes seconds

        return Adafactor(parameters, recipe.learning_rate, scale_parameter=False, relative_step=False)
    if not find_spec("bitsandbytes"):
        raise CafeError(f"optimizer.name: {recipe.name} needs the package bitsandbytes: pip install 'cafe-lvlm[4bit]'.")
    from bitsandbytes import optim

    kinds = {"adamw_8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw_8bit": optim.PagedAdamW8bit}
    made: torch.optim.Optimizer = kinds[recipe.name](parameters, betas=betas, eps=recipe.epsilon)
    return made


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets each group's learning rate to so much of its own; returns the highest."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return max(group["lr"] for group in optimizer.param_groups)


def cosine_schedule_with_warmup(steps: int, warm_up: float) -> Callable[[int], float]:
    """The learning rate's factor at each step: a straight rise over the warm-up, then a half cosine to zero."""
    rise = max(1, round(steps * warm_up))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))

    return factor


def summarize_trainable(lvlm: PreTrainedModel) -> str:
    """One line on what is trained: parameters by part, in millions."""
    counts = dict.fromkeys(get_args(PartName), 0)
    for name, parameter in lvlm.named_parameters():
        if parameter.requires_grad:
            part = model_part(name, lvlm.config.model_type)
            counts[part] += parameter.numel()
    trained = [f"{part.replace('_', ' ')} {count / 1e6:.2f}M" for part, count in counts.items() if count]
    return "Training " + ", ".join(trained)
