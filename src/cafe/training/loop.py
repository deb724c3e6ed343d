"""A run: the recipe's data through the joint step, step after step, to a checkpoint."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from cafe.data.formats import open_source
from cafe.data.loading import UNCUT, Batches, Quarantine, load
from cafe.errors import CafeError
from cafe.families import vision_tower_of
from cafe.model import Cafe
from cafe.training.distributed import clip_gradients, sum_gradients
from cafe.training.log import Log
from cafe.training.optimizer import cosine, describe, freeze, make_optimizer
from cafe.training.recipe import Recipe, recipe_dict
from cafe.training.sharding import gathered, shard, wants_shards, whole_weights
from cafe.training.step import JointStep
from cafe.training.vision import VisionCache


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
    sharded = wants_shards(recipe.model.shard)
    accelerator = Accelerator()
    sharded = sharded and accelerator.num_processes > 1
    if not accelerator.is_main_process:
        report = _silent
    base = resolve_base(recipe.model.base)
    device = torch.device("cpu") if sharded else accelerator.device
    model = Cafe.load(base, recipe.prompts, torch.float32, device, recipe.model.attention)
    if recipe.model.gradient_checkpointing:
        model.lvlm.gradient_checkpointing_enable()
        if recipe.micro_batch != UNCUT:
            report("Gradient checkpointing and micro-batches both save memory by another forward: one of them will do.")
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)

    # The data: contrastive batches in an order fixed by the seed, made ahead in worker processes.
    objective = recipe.objective
    batches = Batches(
        [open_source(source) for source in recipe.data.sources],
        model.processing,
        recipe.batch_size,
        recipe.seed,
        recipe.model.max_tokens,
        contrast=objective.contrastive_weight > 0,
        language=objective.lm_weight > 0,
        hard_negatives=objective.hard_negatives,
        packing=replace(
            model.packing,
            share=model.packing.share and recipe.model.share_prefixes,
            columns=recipe.model.row_tokens or model.packing.columns,
        ),
        size=recipe.micro_batch,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        mixture=recipe.data.mixture,
        blanks=sharded,
    )
    accumulate = recipe.optimizer.accumulate
    steps = recipe.steps or max(1, recipe.epochs * len(batches) // accumulate)
    stream = load(batches, 0, steps * accumulate, recipe.data.workers)
    quarantine = Quarantine(output / "quarantine.jsonl", recipe.data.max_bad_share)

    # The model and its optimiser.
    freeze(model.lvlm, recipe.model.frozen)
    tower = vision_tower_of(model.lvlm)
    vision = None
    if tower is not None and "vision_tower" in recipe.model.frozen:
        vision = VisionCache(tower, Path(recipe.model.vision_cache) if recipe.model.vision_cache else None)
    joint = JointStep(model.lvlm.train(), objective, recipe.model.precision, vision, batches.nothing())
    report(f"{describe(model.lvlm)}; {steps} steps of {recipe.batch_size * accelerator.num_processes} pairs.")
    if sharded:
        shard(joint.reading, accelerator.device, joint.reading.bf16, whole=vision.tower if vision else None)
    joint.to(accelerator.device)
    trained = [parameter for parameter in joint.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(joint, model.lvlm.config.model_type, recipe.optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps, recipe.optimizer.warm_up))
    log = Log(output) if accelerator.is_main_process else None

    progress = tqdm(range(1, steps + 1), desc="train", unit="step", disable=not accelerator.is_main_process)
    for step in progress:
        measure = step % recipe.log_every == 0 or step in (1, steps)
        for part in range(accumulate):
            batch = next(stream)
            quarantine.check(batch)
            losses = joint(batch, share=1 / accumulate, measure=measure and part == 0)
            loss = objective.lm_weight * losses.lm + objective.contrastive_weight * losses.contrastive
            if not torch.isfinite(loss):
                names = ", ".join(batch.sources[:3])
                raise CafeError(f"The loss is {loss.item()} at step {step}, on {names} and others of its batch.")
            if part == 0:
                shown = losses
        sum_gradients(trained)
        norm = clip_gradients(trained, recipe.optimizer.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        if measure and log:
            values = {
                "loss": loss.item(),
                "lm_loss": shown.lm.item(),
                "contrastive_loss": shown.contrastive.item(),
                "temperature": shown.temperature.item(),
                "grad_norm": norm.item(),
                **shown.measured,
                "lr": max(schedule.get_last_lr()),
            }
            log.write(step, values)
            progress.set_postfix({name: f"{values[name]:.3f}" for name in ("lm_loss", "contrastive_loss", "accuracy")})
        if evaluate and recipe.evaluation.every and step % recipe.evaluation.every == 0:
            with gathered(joint.reading):  # in every process: sharded layers are read by all at once
                found = evaluate(replace(model, lvlm=model.lvlm.eval()))
            if log:
                log.write(step, found)
            model.lvlm.train()

    weights = whole_weights(model.lvlm)
    if accelerator.is_main_process:
        model.lvlm.eval()
        temperature = joint.log_temperature.exp().item()
        model.save(output / "checkpoint", weights, temperature=temperature, recipe=recipe_dict(recipe), steps=steps)
        report(f"The checkpoint is in {output / 'checkpoint'}; {quarantine.bad} of {quarantine.seen} records were bad.")
    return output / "checkpoint"


def _silent(line: str) -> None:
    """Says nothing: one process speaks for all."""


def resolve_base(base: str) -> str:
    """Where a base model is: the shipped one's directory for "scenes", else the path or Hub id itself."""
    return str(Path(__file__).parents[1] / "scenes" / "base") if base == "scenes" else base
