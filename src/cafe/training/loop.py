"""The joint step, read top to bottom as the method (CAFe, arXiv 2503.19900).

Each step embeds the queries and targets of one contrastive batch, reads its dialogues, and follows the gradient of

    loss = lm_weight * L_lm + contrastive_weight * L_con.

This is the plain form: every branch goes through the model by itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from cafe.data.formats import open_source
from cafe.data.loading import Batch, Batches, Quarantine, load
from cafe.errors import CafeError
from cafe.model import Cafe, embed_rows, to_device
from cafe.objectives import info_nce, next_token_loss, retrieval_accuracy
from cafe.training.distributed import everyone, gather, world
from cafe.training.log import Log
from cafe.training.optimizer import cosine, describe, make_optimizer, objective_norms
from cafe.training.recipe import ObjectiveRecipe, Recipe, recipe_dict

LOWEST_TEMPERATURE = 0.01  # CLIP's bound on a learned temperature


@dataclass
class Losses:
    """The parts of one batch's loss, and what the log tells of them."""

    lm: Float[Tensor, ""]
    contrastive: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    temperature: Float[Tensor, ""]


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
            masked = gather(batch.target_ids.to(queries.device)) if objective.mask_duplicates else None
            contrastive = info_nce(queries, targets, temperature, negatives, masked)
            accuracy = retrieval_accuracy(queries.detach(), targets.detach(), masked)

        if objective.lm_weight and batch.dialogues and batch.supervised is not None:
            inputs = self.move(batch.dialogues)
            supervised = batch.supervised.to(temperature.device)
            # Gradients are averaged over processes: divided by the mean count, the parts make the mean over all tokens.
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


def train(
    recipe: Recipe,
    evaluate: Callable[[Cafe], dict[str, float]] | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Follows a recipe and writes the checkpoint; returns its directory.

    Args:
        recipe: the run.
        evaluate: measures the model every `recipe.evaluation.every` steps; what it returns is logged.
        report: takes the lines meant for people.

    Raises:
        CafeError: the recipe, the data or the base model cannot be used, or the loss is no longer finite.
    """
    set_seed(recipe.seed)
    accelerator = Accelerator(mixed_precision="no" if recipe.model.precision == "fp32" else "bf16")
    base = resolve_base(recipe.model.base)
    model = Cafe.load(base, recipe.prompts, torch.float32, accelerator.device, recipe.model.attention)
    if recipe.model.gradient_checkpointing:
        model.lvlm.gradient_checkpointing_enable()
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)

    # The data: contrastive batches in an order fixed by the seed, made ahead in worker processes.
    batches = Batches(
        [open_source(source) for source in recipe.data.sources],
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

    # The model and its optimiser.
    module = JointStep(model.lvlm.train(), recipe.objective)
    optimizer = make_optimizer(module, model.lvlm.config.model_type, recipe.optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps, recipe.optimizer.warm_up))
    joint, optimizer = accelerator.prepare(module, optimizer)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    log = Log(output) if accelerator.is_main_process else None

    report(f"{describe(model.lvlm)}; {steps} steps of {recipe.batch_size} pairs.")
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
                names = ", ".join(batch.sources[:3])
                raise CafeError(f"The loss is {loss.item()} at step {step}, on {names} and others of its batch.")
            if measured and part == 0:
                norms = objective_norms({"lm": losses.lm, "contrastive": losses.contrastive}, trained)
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
                "lr": max(schedule.get_last_lr()),
            }
            log.write(step, values)
            progress.set_postfix({name: f"{values[name]:.3f}" for name in ("lm_loss", "contrastive_loss", "accuracy")})
        if evaluate and log and recipe.evaluation.every and step % recipe.evaluation.every == 0:
            log.write(step, evaluate(Cafe(model.lvlm.eval(), model.processing)))
            model.lvlm.train()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model.lvlm.eval()
        temperature = module.log_temperature.exp().item()
        model.save(output / "checkpoint", temperature=temperature, recipe=recipe_dict(recipe), steps=steps)
        report(f"The checkpoint is in {output / 'checkpoint'}; {quarantine.bad} of {quarantine.seen} records were bad.")
    return output / "checkpoint"


def resolve_base(base: str) -> str:
    """Where a base model is: the shipped one's directory for "scenes", else the path or Hub id itself."""
    return str(Path(__file__).parents[1] / "scenes" / "base") if base == "scenes" else base
