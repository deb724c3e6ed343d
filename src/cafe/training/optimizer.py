"""What is trained, the optimizer with a learning rate per part of the model, and its schedule."""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cafe.errors import MissingPackageError, RecipeError
from cafe.lvlm.adapters import add_adapter
from cafe.lvlm.families import PartName, model_part
from cafe.training.muon import Muon, hidden_weight_names
from cafe.training.precision import AUTOCAST_DTYPES
from cafe.training.recipe import ModelConfig, OptimizerConfig


def configure_trainable_parameters(lvlm: PreTrainedModel, config: ModelConfig) -> None:
    """Freeze what the recipe does not train, add its adapter, and cast what is frozen to the dtype that it names.

    Gradient checkpointing is enabled too, if the recipe says so.
    """
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(lvlm)
    if config.adapter:
        add_adapter(lvlm, config.adapter)
    else:
        freeze(lvlm, config.freeze)
    # "fp32" is what they are loaded in, and "4bit" is quantized as it is loaded.
    dtype = AUTOCAST_DTYPES.get(config.frozen_weights_dtype)
    if dtype is None:
        return
    for parameter in lvlm.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def enable_gradient_checkpointing(lvlm: PreTrainedModel) -> None:
    """Make layers recompute their activations in the backward pass instead of keeping them.

    Raises:
        RecipeError: the model does not support it.
    """
    if not lvlm.supports_gradient_checkpointing:
        raise RecipeError(f"model.gradient_checkpointing: a {lvlm.config.model_type} model does not support it.")
    older = lvlm.gradient_checkpointing_enable  # the only name in transformers 5.10, and deprecated in 5.23
    getattr(lvlm, "activation_checkpointing_enable", older)()


def freeze(lvlm: PreTrainedModel, parts: Sequence[PartName]) -> None:
    """Exclude some parts of a model from training, and include all others."""
    for name, parameter in lvlm.named_parameters():
        parameter.requires_grad_(model_part(name, lvlm.config.model_type) not in parts)


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


class _GroupKey(NamedTuple):
    """What parameters of one optimizer group have in common."""

    learning_rate: float
    weight_decay: float
    orthogonal: bool
    sharded: bool  # sharded parameters cannot be stepped together with whole ones


def make_optimizer(step: nn.Module, family: str, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make the recipe's optimizer over a module's trainable parameters, grouped by part of the family.

    Raises:
        RecipeError: it does not support sharded parameters.
        MissingPackageError: it needs a package that is not installed.
    """
    groups = _parameter_groups(step, family, config)
    if config.name != "adamw" and any(key.sharded for key in groups):
        raise RecipeError(f"optimizer.name: {config.name} does not support model.shard; adamw does.")
    parameters = [
        {"params": group, "lr": key.learning_rate, "weight_decay": key.weight_decay, "orthogonal": key.orthogonal}
        for key, group in groups.items()
    ]
    betas = config.beta1, config.beta2
    # Learning rates and weight decay are the groups' own.
    match config.name:
        case "adamw":
            return torch.optim.AdamW(parameters, betas=betas, eps=config.epsilon, fused=True)
        case "muon":
            return Muon(parameters, betas=betas, eps=config.epsilon)
        case "adafactor":
            from transformers import Adafactor  # imports peft, which takes seconds

            # With the learning rate that it is given, instead of one that it makes itself.
            return Adafactor(parameters, config.learning_rate, scale_parameter=False, relative_step=False)
        case _:
            return _bitsandbytes_optimizer(parameters, config)


def _parameter_groups(step: nn.Module, family: str, config: OptimizerConfig) -> dict[_GroupKey, list[nn.Parameter]]:
    """Group the trainable parameters by what the optimizer does with them."""
    part_rates = {
        "vision_tower": config.vision_tower_learning_rate,
        "projector": config.projector_learning_rate,
        "language_model": config.learning_rate,
    }
    orthogonal = hidden_weight_names(step) if config.name == "muon" else set()
    groups: dict[_GroupKey, list[nn.Parameter]] = {}
    for name, parameter in trainable_parameters(step).items():
        rate = part_rates[model_part(name, family)]
        if rate is None:
            rate = config.learning_rate  # a rate of 0 is one, too
        key = _GroupKey(
            learning_rate=rate,
            weight_decay=config.weight_decay if parameter.ndim > 1 else 0.0,  # not for vectors and scalars
            orthogonal=name in orthogonal,
            sharded=isinstance(parameter, DTensor),
        )
        groups.setdefault(key, []).append(parameter)
    return groups


def _bitsandbytes_optimizer(parameters: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make one of the optimizers that keep their state in 8 bits or in CPU memory."""
    if not find_spec("bitsandbytes"):
        raise MissingPackageError(
            f"optimizer.name: {config.name} needs the package bitsandbytes: pip install 'cafe-lvlm[4bit]'."
        )
    from bitsandbytes import optim

    classes = {"adamw_8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw_8bit": optim.PagedAdamW8bit}
    optimizer: torch.optim.Optimizer = classes[config.name](
        parameters, betas=(config.beta1, config.beta2), eps=config.epsilon
    )
    return optimizer


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's learning rate to `factor` times its initial one; return the highest."""
    for group in optimizer.param_groups:
        # Kept in the group, as PyTorch's schedulers do.
        initial = group.setdefault("initial_lr", group["lr"])
        group["lr"] = initial * factor
    return max(group["lr"] for group in optimizer.param_groups)


def cosine_schedule_with_warmup(num_steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """Return the learning rate's factor by step: a linear rise over the warmup, then half a cosine down to zero."""
    num_warmup_steps = max(1, round(num_steps * warmup_ratio))

    def factor(step: int) -> float:
        """Return what the learning rate is multiplied by in a step, from 0."""
        if step < num_warmup_steps:
            return (step + 1) / num_warmup_steps  # not 0 in the first step, which would be lost
        progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def summarize_trainable(lvlm: PreTrainedModel) -> str:
    """Return one line on what is trained: parameters by part, in millions."""
    counts = dict.fromkeys(get_args(PartName), 0)
    for name, parameter in trainable_parameters(lvlm).items():
        counts[model_part(name, lvlm.config.model_type)] += parameter.numel()
    trained = [f"{part.replace('_', ' ')} {count / 1e6:.2f}M" for part, count in counts.items() if count]
    return "Training " + ", ".join(trained)
