"""A run: the recipe's data through the joint step, step after step, to a checkpoint.

Whatever ends a run early, the same command goes on from the last saved state and ends with the same weights.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from tqdm import tqdm

from cafe.data.formats import open_source
from cafe.data.loading import UNCUT, Quarantine
from cafe.errors import CafeError, Stopped
from cafe.image_limits import limit_images
from cafe.model import Cafe, checkpoint_of
from cafe.training import checkpoints
from cafe.training.checkpoints import Position, full_disk, generators, set_generators
from cafe.training.compiling import compile_layers
from cafe.training.distributed import clip_gradients, differing, everyone, first_ones, launched, most, sum_gradients
from cafe.training.examine import Examination
from cafe.training.finite import leave_out
from cafe.training.log import Log, installed
from cafe.training.memory import Feed, fitting_size, follow
from cafe.training.optimizer import cosine, describe, make_optimizer, set_rates
from cafe.training.output import CHECKPOINT, STATE, claim, finished
from cafe.training.recipe import HALF, Recipe, recipe_dict
from cafe.training.scaling import FLOAT16, LossScale, unscale
from cafe.training.setup import make_batches, make_joint
from cafe.training.sharding import shard, wants_shards, whole_weights
from cafe.training.stopping import stopping
from cafe.training.zero import Zero, wants_zero


def train(
    recipe: Recipe,
    evaluate: Callable[[Cafe], dict[str, float]] | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Follows a recipe and writes the checkpoint; returns its directory.

    A run that broke off is gone on with, and one that is finished is left as it is.

    Args:
        recipe: the run.
        evaluate: measures the model every `recipe.evaluation.every` steps; what it returns is logged.
        report: takes the lines meant for people.

    Raises:
        CafeError: the recipe, the data or the base model cannot be used; the output holds another run; too many steps
            were not finite; the disk is full.
        Stopped: a signal asked the run to stop, and it has saved where it stands.
    """
    output = Path(recipe.output)
    if finished(recipe):
        report(f"{output / CHECKPOINT} is the end of this recipe already; nothing is left to do.")
        return output / CHECKPOINT
    set_seed(recipe.seed)
    sharded = wants_shards(recipe.model.shard)
    divided = wants_zero(recipe)
    if recipe.evaluation.every and recipe.evaluation.data and not evaluate:
        raise CafeError(
            "evaluation.every is set, and nothing measures evaluation.data: `train` takes what does, which "
            "cafe.evaluation.evaluate.during(recipe) makes."
        )
    accelerator = launched(log_with=installed(recipe.trackers or ()), project_dir=output / "trackers")
    sharded = sharded and accelerator.num_processes > 1
    rank, device, objective = accelerator.process_index, accelerator.device, recipe.objective
    if recipe.model.attention == "flex_attention" and device.type == "cpu":
        raise CafeError("model.attention: flex_attention has no backward pass on a CPU; sdpa has.")
    report = report if rank == 0 else lambda line: None
    name = first_ones(lambda: claim(recipe))

    # The data, which may be missing, the model, batches in an order fixed by the seed, the step, and its optimizer.
    sources = [open_source(source) for source in recipe.data.sources]
    base, place = resolve_base(recipe.model.base), torch.device("cpu") if sharded else device
    halved = recipe.model.adapter and recipe.model.frozen_weights != "fp32"
    dtype = HALF[recipe.model.precision] if halved else torch.float32
    four_bit = recipe.model.frozen_weights == "4bit"
    model = Cafe.load(base, recipe.prompts, dtype, place, recipe.model.attention, four_bit)
    model.record.clear()  # it tells of the base, and this becomes another model
    limit_images(model.lvlm, model.processing.processor, recipe.model.max_pixels, recipe.model.grids)
    batches = make_batches(recipe, model, rank, accelerator.num_processes, sharded, sources)
    joint = make_joint(recipe, model, batches.nothing())
    if wrong := differing(joint.state_dict(), device):  # whose gradients would be summed
        raise CafeError(f"The processes loaded different weights, {wrong[0]} first: is {base} the same in all?")
    about = describe(model.lvlm)
    if sharded:
        shard(joint.reading, device, joint.reading.dtype, whole=joint.vision.tower if joint.vision else None)
    joint.to(device)
    if recipe.model.compile:
        compile_layers(model.lvlm)
    trained = [parameter for parameter in joint.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(joint, model.lvlm.config.model_type, recipe.optimizer)
    clip, accumulate = recipe.optimizer.clip, recipe.optimizer.accumulate
    zero = Zero(trained, optimizer, clip) if divided and accelerator.num_processes > 1 else None
    steps = recipe.steps or max(1, recipe.epochs * len(batches) // accumulate)
    schedule = cosine(steps, recipe.optimizer.warm_up)
    report(f"{about}; {steps} steps of {recipe.batch_size * accelerator.num_processes} pairs.")

    # Where the run stood when it was last saved; at its start if it never was.
    scale = FLOAT16 if recipe.model.precision == "fp16" else LossScale()
    at = checkpoints.load(output / STATE, joint, optimizer, report) or Position(scale=scale, generators=generators())
    if at.step:
        report(f"Going on after step {at.step}.")
    if recipe.micro_batch == "auto" and not at.size:
        at.size = fitting_size(joint, batches, recipe.memory)
        report(f"Micro-batches of {at.size.tokens or 'all'} tokens and {at.size.crops or 'all'} crops fit.")
    feed = Feed(batches, at.size, at.step, steps, accumulate, recipe.data.workers, report)
    if recipe.model.gradient_checkpointing and feed.batches.size != UNCUT:
        report(
            "Warning: model.gradient_checkpointing and micro_batch both save memory by one more forward pass; together "
            "they are for where a single pair does not fit without the first."
        )
    named = output / f"quarantine{f'-{rank}' if rank else ''}.jsonl"
    quarantine = Quarantine(named, recipe.data.max_bad_share, at.bad, at.seen)
    log = Log(output, accelerator, name, at.step) if rank == 0 else None
    examination = Examination(recipe, model, joint, evaluate, rank)
    set_generators(at.generators)

    with stopping() as stop, full_disk(output):
        bar = tqdm(range(at.step + 1, steps + 1), "train", steps, initial=at.step, unit="step", disable=log is None)
        for step in bar:
            # Both losses of each contrastive batch, and their gradient summed over batches and processes; where that
            # overflows and the loss does not, once more under half the scale.
            measure = step in (1, steps) or (recipe.log_every > 0 and step % recipe.log_every == 0)
            parts = [quarantine.check(batch) for batch in next(feed)]
            scale, drawn = at.scale, generators()
            while True:
                losses = follow(joint, parts, feed, measure, scale.factor)
                lm = torch.stack([each.lm for each in losses]).mean()
                contrastive = torch.stack([each.contrastive for each in losses]).mean()
                loss = objective.lm_weight * lm + objective.contrastive_weight * contrastive
                if zero:
                    norm = zero.sum_gradients(scale.factor)
                else:
                    unscale(trained, scale.factor)
                    sum_gradients(trained)
                    norm = clip_gradients(trained, clip)
                finite = most(not (loss.isfinite() and norm.isfinite()), device) == 0
                if finite or scale.factor == 1 or most(not loss.isfinite(), device):
                    break
                scale = scale.lower()
                report(f"The gradient overflows at step {step}: again with the loss scaled by {scale.factor:.0f}.")
                joint.zero_grad()
                set_generators(drawn)

            # One step down the gradient, if it is one; if not, the scale had no part in it.
            rate = set_rates(optimizer, schedule(step - 1))
            if finite:
                (zero or optimizer).step()
                at.scale = scale.after_step()
            optimizer.zero_grad()

            # What is to be known of it.
            at.step = step
            if not finite:
                leave_out(at, joint, feed.batches, accumulate, recipe.max_skipped, log)
            elif measure and log:
                values = {
                    "loss": loss.item(),
                    "lm_loss": lm.item(),
                    "contrastive_loss": contrastive.item(),
                    "temperature": losses[0].temperature.item(),
                    "grad_norm": norm.item(),
                    **losses[0].measured,
                    "lr": rate,
                }
                log.write(step, values)
                bar.set_postfix({key: f"{values[key]:.3f}" for key in ("lm_loss", "contrastive_loss", "accuracy")})
            if examination.due(step):
                examination(at, log)

            # Where it stands, so that nothing is lost.
            asked = most(stop.signal, device)
            if asked or (recipe.save_every and step % recipe.save_every == 0):
                at = replace(at, size=feed.found, bad=quarantine.bad, seen=quarantine.seen, generators=generators())
                checkpoints.save(output / STATE, joint, optimizer, at, recipe.keep_last)
            if asked:
                raise Stopped(f"Stopped after step {step} of {steps}, which is saved; the same command goes on.", asked)

        weights = whole_weights(model.lvlm)
        bad, seen = everyone(torch.tensor([quarantine.bad, quarantine.seen], device=device)).tolist()
        if log:
            model.lvlm.eval()
            temperature = joint.log_temperature.exp().item()
            made = {"temperature": temperature, "recipe": recipe_dict(recipe), "steps": steps}
            model.save(output / CHECKPOINT, weights, **made)
            shutil.rmtree(output / STATE, ignore_errors=True)  # only an unfinished run needs it
            log.close()
            report(f"The checkpoint is in {output / CHECKPOINT}; {bad} of {seen} records were bad.")
    accelerator.wait_for_everyone()
    return output / CHECKPOINT


def resolve_base(base: str) -> str:
    """Where a base model is: for "scenes" the shipped one's directory, for a run its checkpoint, else as it is given.

    Raises:
        CafeError: it can be no Hub id, and no directory is there.
    """
    if base == "scenes":
        return str(Path(__file__).parents[1] / "scenes" / "base")
    path = Path(base).expanduser()
    if path.is_dir():
        return str(checkpoint_of(path))
    if base.startswith(("/", "./", "../", "~")) or base.count("/") > 1:
        raise CafeError(f"The model's directory {base} does not exist.")
    return base
