"""The joint step, read top to bottom as the method (CAFe, arXiv 2503.19900).

Each step embeds the queries and targets of one contrastive batch, reads its dialogues, and follows the gradient of

    loss = lm_weight * L_lm + contrastive_weight * L_con.

This is the plain form: every branch goes through the model by itself.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed.nn.functional as dist_nn
from accelerate import Accelerator
from accelerate.utils import set_seed
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import PreTrainedModel

from cafe.content import Content
from cafe.data.formats import Source, open_source
from cafe.data.loading import Batch, Batches, Quarantine, load
from cafe.errors import CafeError
from cafe.families import part_of
from cafe.model import Cafe, embed_rows, to_device
from cafe.objectives import info_nce, next_token_loss, retrieval_accuracy
from cafe.training.recipe import ObjectiveRecipe, OptimizerRecipe, Recipe, recipe_dict

LOWEST_TEMPERATURE = 0.01  # CLIP's bound on a learned temperature
SCENES_BASE = "scenes"


@dataclass
class Losses:
    """The parts of one batch's loss, and what the log tells of them."""

    lm: Tensor
    contrastive: Tensor
    accuracy: Tensor
    temperature: Tensor


class JointStep(nn.Module):
    """The forward half of the joint step: a contrastive batch in, both losses out."""

    def __init__(self, lvlm: PreTrainedModel, objective: ObjectiveRecipe) -> None:
        super().__init__()
        self.lvlm: PreTrainedModel = lvlm
        self.objective = objective
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(objective.temperature)), requires_grad=objective.learn_temperature
        )

    def forward(self, batch: Batch) -> Losses:
        objective = self.objective
        temperature = self.log_temperature.exp().clamp(min=LOWEST_TEMPERATURE)
        lm = contrastive = accuracy = torch.zeros((), device=temperature.device)

        if objective.contrastive_weight and batch.queries and batch.targets:
            queries = gather(self.embed(batch.queries))
            targets = gather(self.embed(batch.targets))
            negatives = gather(self.embed(batch.negatives)) if batch.negatives else None
            target_ids = gather(batch.target_ids.to(queries.device))
            masked = target_ids if objective.mask_duplicates else None
            contrastive = info_nce(queries, targets, temperature, negatives, masked)
            accuracy = retrieval_accuracy(queries.detach(), targets.detach(), masked)

        if objective.lm_weight and batch.dialogues and batch.supervised is not None:
            inputs = self.move(batch.dialogues)
            supervised = batch.supervised.to(temperature.device)
            # Ranks' gradients are averaged: scaled by their number, the sum of their parts is the mean over all tokens.
            count = everyone(supervised[:, 1:].sum()) / world()
            logits = self.lvlm(**inputs, use_cache=False).logits
            lm = next_token_loss(logits, inputs["input_ids"], supervised, count)

        return Losses(lm, contrastive, accuracy, temperature)

    def embed(self, inputs: dict[str, Tensor]) -> Float[Tensor, "rows dim"]:
        """The rows' readouts, not yet normalised."""
        return embed_rows(self.lvlm, self.move(inputs)).float()

    def move(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs where the model is."""
        return to_device(inputs, self.log_temperature.device, torch.float32)


def train(recipe: Recipe, report: Callable[[str], None] = print) -> Path:
    """Follows a recipe and writes the checkpoint; returns its directory.

    Raises:
        CafeError: the recipe, the data or the base model cannot be used, or the loss is no longer finite.
    """
    set_seed(recipe.seed)
    accelerator = Accelerator(mixed_precision="no" if recipe.model.precision == "fp32" else "bf16")
    model = Cafe.load(
        base_path(recipe.model.base), recipe.prompts, torch.float32, accelerator.device, recipe.model.attention
    )
    lvlm = model.lvlm.train()
    if recipe.model.gradient_checkpointing:
        lvlm.gradient_checkpointing_enable()
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)

    sources = [open_source(source) for source in recipe.data.sources]
    batches = Batches(
        sources,
        model.processing,
        recipe.batch_size,
        recipe.seed,
        recipe.model.max_tokens,
        recipe.objective.hard_negatives and recipe.objective.contrastive_weight > 0,
        accelerator.process_index,
        accelerator.num_processes,
    )
    accumulate = recipe.optimizer.accumulate
    steps = recipe.steps or max(1, recipe.epochs * len(batches) // accumulate)
    stream = load(batches, 0, steps * accumulate, recipe.data.workers)
    quarantine = Quarantine(output / "quarantine.jsonl", recipe.data.max_bad_share)

    step_module = JointStep(lvlm, recipe.objective)
    optimizer = make_optimizer(step_module, recipe.optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps, recipe.optimizer.warm_up))
    joint, optimizer = accelerator.prepare(step_module, optimizer)
    log = Log(output) if accelerator.is_main_process else None

    report(f"{describe(step_module, lvlm.config.model_type)}; {steps} steps of {recipe.batch_size} pairs.")
    progress = tqdm(range(1, steps + 1), desc="train", unit="step", disable=not accelerator.is_main_process)
    for step in progress:
        measured = step % recipe.log_every == 0 or step in (1, steps)
        norms: dict[str, float] = {}
        for part in range(accumulate):
            batch = next(stream)
            quarantine.check(batch)
            losses = joint(batch)
            loss = recipe.objective.lm_weight * losses.lm + recipe.objective.contrastive_weight * losses.contrastive
            if not torch.isfinite(loss):
                raise CafeError(
                    f"The loss is {loss.item()} at step {step}, on {', '.join(batch.sources[:3])} and others."
                )
            if measured and part == 0:
                norms = objective_norms(losses, [p for p in step_module.parameters() if p.requires_grad])
            accelerator.backward(loss / accumulate)
        norm = accelerator.clip_grad_norm_(joint.parameters(), recipe.optimizer.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if measured and log:
            values = {
                "loss": loss.item(),
                "lm_loss": losses.lm.item(),
                "contrastive_loss": losses.contrastive.item(),
                "accuracy": losses.accuracy.item(),
                "temperature": losses.temperature.item(),
                "grad_norm": float(norm),
                **norms,
                "lr": schedule.get_last_lr()[-1],
            }
            log.write(step, values)
            progress.set_postfix({name: f"{values[name]:.3f}" for name in ("lm_loss", "contrastive_loss", "accuracy")})
        if recipe.evaluation.every and step % recipe.evaluation.every == 0 and log:
            log.write(step, {"heldout/accuracy": heldout_accuracy(model, recipe)})
            lvlm.train()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        temperature = step_module.log_temperature.exp().item()
        model.lvlm.eval()
        model.save(output / "checkpoint", temperature=temperature, recipe=recipe_dict(recipe), steps=steps)
        report(f"The checkpoint is in {output / 'checkpoint'}; {quarantine.bad} of {quarantine.seen} records were bad.")
    return output / "checkpoint"


def base_path(base: str) -> str:
    """Where a base model is: the shipped one's directory, or the path or Hub id itself."""
    return str(Path(__file__).parents[1] / "scenes" / "base") if base == SCENES_BASE else base


def make_optimizer(step: JointStep, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """AdamW with a learning rate for each part of the model; vectors and scalars are not decayed."""
    family = step.lvlm.config.model_type
    rates = {
        "vision_tower": recipe.vision_tower_learning_rate or recipe.learning_rate,
        "projector": recipe.projector_learning_rate or recipe.learning_rate,
        "language_model": recipe.learning_rate,
    }
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


def objective_norms(losses: Losses, parameters: list[nn.Parameter]) -> dict[str, float]:
    """The norm of each objective's own gradient, before weighting and clipping."""
    norms = {}
    for name, loss in (("grad_norm_lm", losses.lm), ("grad_norm_contrastive", losses.contrastive)):
        grads = (
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if loss.requires_grad else []
        )
        norms[name] = math.sqrt(sum(grad.float().square().sum().item() for grad in grads if grad is not None))
    return norms


def describe(step: JointStep, family: str) -> str:
    """One line on what is trained: parameters by part, in millions."""
    counts: dict[str, int] = {}
    for name, parameter in step.lvlm.named_parameters():
        if parameter.requires_grad:
            part = part_of(name, family)
            counts[part] = counts.get(part, 0) + parameter.numel()
    return "Training " + ", ".join(f"{part.replace('_', ' ')} {count / 1e6:.2f}M" for part, count in counts.items())


def heldout_accuracy(model: Cafe, recipe: Recipe) -> float:
    """In-batch retrieval accuracy (0 to 1) on pairs of the evaluation data's test split, without gradient."""
    files = sorted(Path(recipe.evaluation.data).glob("dataset_*.json"))
    if not files:
        raise CafeError(f"evaluation.data: no dataset_*.json in {recipe.evaluation.data!r}.")
    records = open_source(Source(path=str(files[0]), format="karpathy", split="test"))
    chosen = range(min(len(records), recipe.evaluation.limit or len(records)))
    pairs = [pair for index in chosen if (pair := records.example(index, Random(index)).pair)]
    model.lvlm.eval()
    sides: list[list[Content]] = [[pair.query for pair in pairs], [pair.target for pair in pairs]]
    queries, targets = (torch.from_numpy(model.embed(side)) for side in sides)
    return retrieval_accuracy(queries, targets).item()


class Log:
    """Writes each measured step to TensorBoard and to `log.jsonl`."""

    def __init__(self, directory: Path) -> None:
        self.file = (directory / "log.jsonl").open("w", buffering=1)
        self.board = SummaryWriter(str(directory / "tensorboard"))
        self.started = time.monotonic()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One record."""
        seconds = round(time.monotonic() - self.started, 2)
        self.file.write(json.dumps({"step": step, "seconds": seconds, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)


def world() -> int:
    """The number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def everyone(count: Tensor) -> Tensor:
    """The sum of a number over all processes."""
    if world() > 1:
        torch.distributed.all_reduce(count)
    return count


def gather(rows: Tensor) -> Tensor:
    """All processes' rows, with gradient.

    The backward pass sums the gradients of all processes' losses, which are equal: so after gradients are averaged over
    processes they are those of the one global loss.
    """
    if world() == 1:
        return rows
    return torch.cat(tuple(dist_nn.all_gather(rows.contiguous())), dim=0)
