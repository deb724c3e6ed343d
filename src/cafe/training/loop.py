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

from cafe.checkpoint import resolve_checkpoint
from cafe.data.batch import NO_LIMIT
from cafe.data.quarantine import Quarantine
from cafe.data.records import open_source
from cafe.errors import CafeError, RunInterrupted
from cafe.lvlm.image_size import set_max_image_size
from cafe.model import Cafe
from cafe.training import checkpointing
from cafe.training.build import build_dataset, build_step
from cafe.training.checkpointing import TrainerState, disk_full_errors
from cafe.training.compile import compile_layers
from cafe.training.deepspeed import DeepSpeedZero, uses_deepspeed
from cafe.training.fsdp import apply_fsdp, full_state_dict, uses_fsdp
from cafe.training.loss_scale import FLOAT16, LossScale, unscale
from cafe.training.metrics_log import MetricsLogger, require_trackers
from cafe.training.micro_batching import BatchFeed, find_micro_batch_size, run_step_with_oom_retry
from cafe.training.nonfinite import skip_nonfinite_step
from cafe.training.optimizer import cosine_schedule_with_warmup, make_optimizer, set_learning_rates, summarize_trainable
from cafe.training.recipe import AUTOCAST_DTYPES, Recipe, recipe_dict
from cafe.training.run_directory import CHECKPOINT, STATE, claim_run_directory, is_finished
from cafe.training.signals import catch_stop_signals
from cafe.training.validation import Validator
from cafe.utils.distributed import (
    all_reduce_gradients,
    all_reduce_max,
    all_reduce_sum_,
    clip_grad_norm_,
    make_accelerator,
    mismatched_tensors,
    run_on_main_and_broadcast,
)
from cafe.utils.rng import get_rng_state, set_rng_state


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
    if is_finished(recipe):
        report(f"{output / CHECKPOINT} is the end of this recipe already; nothing is left to do.")
        return output / CHECKPOINT
    set_seed(recipe.seed)
    sharded = uses_fsdp(recipe.model.shard)
    divided = uses_deepspeed(recipe)
    if recipe.evaluation.eval_steps and recipe.evaluation.data and not evaluate:
        raise CafeError(
            "evaluation.eval_steps is set, and nothing measures evaluation.data: `train` takes what does, which "
            "cafe.evaluation.evaluate.during(recipe) makes."
        )
    accelerator = make_accelerator(log_with=require_trackers(recipe.trackers or ()), project_dir=output / "trackers")
    sharded = sharded and accelerator.num_processes > 1
    rank, device, objective = accelerator.process_index, accelerator.device, recipe.objective
    if recipe.model.attention == "flex_attention" and device.type == "cpu":
        raise CafeError("model.attention: flex_attention has no backward pass on a CPU; sdpa has.")
    report = report if rank == 0 else lambda line: None
    name = run_on_main_and_broadcast(lambda: claim_run_directory(recipe))

    # The data, which may be missing, the model, batches in an order fixed by the seed, the step, and its optimizer.
    sources = [open_source(source) for source in recipe.data.sources]
    base, place = resolve_checkpoint(recipe.model.base), torch.device("cpu") if sharded else device
    halved = recipe.model.adapter and recipe.model.frozen_weights_dtype != "fp32"
    dtype = AUTOCAST_DTYPES[recipe.model.precision] if halved else torch.float32
    four_bit = recipe.model.frozen_weights_dtype == "4bit"
    model = Cafe.load(base, recipe.prompts, dtype, place, recipe.model.attention, four_bit)
    model.metadata.clear()  # it tells of the base, and this becomes another model
    set_max_image_size(
        model.lvlm, model.chat_processor.processor, recipe.model.max_image_pixels, recipe.model.image_grids
    )
    batches = build_dataset(recipe, model, rank, accelerator.num_processes, sharded, sources)
    joint = build_step(recipe, model, batches.blank_micro_batch())
    if wrong := mismatched_tensors(joint.state_dict(), device):  # whose gradients would be summed
        raise CafeError(f"The processes loaded different weights, {wrong[0]} first: is {base} the same in all?")
    about = summarize_trainable(model.lvlm)
    if sharded:
        apply_fsdp(
            joint.packed_forward, device, joint.packed_forward.dtype, whole=joint.vision.tower if joint.vision else None
        )
    joint.to(device)
    if recipe.model.compile:
        compile_layers(model.lvlm)
    trained = [parameter for parameter in joint.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(joint, model.lvlm.config.model_type, recipe.optimizer)
    clip, accumulate = recipe.optimizer.max_grad_norm, recipe.optimizer.gradient_accumulation_steps
    zero = DeepSpeedZero(trained, optimizer, clip) if divided and accelerator.num_processes > 1 else None
    steps = recipe.max_steps or max(1, recipe.num_train_epochs * len(batches) // accumulate)
    schedule = cosine_schedule_with_warmup(steps, recipe.optimizer.warmup_ratio)
    report(f"{about}; {steps} steps of {recipe.batch_size * accelerator.num_processes} pairs.")

    # Where the run stood when it was last saved; at its start if it never was.
    scale = FLOAT16 if recipe.model.precision == "fp16" else LossScale()
    at = checkpointing.load(output / STATE, joint, optimizer, report) or TrainerState(
        loss_scale=scale, rng_state=get_rng_state()
    )
    if at.step:
        report(f"Going on after step {at.step}.")
    if recipe.micro_batch == "auto" and not at.micro_batch_size:
        at.micro_batch_size = find_micro_batch_size(joint, batches, recipe.memory_limit_gib)
        report(
            f"Micro-batches of {at.micro_batch_size.tokens or 'all'} tokens and {at.micro_batch_size.crops or 'all'} crops fit."
        )
    feed = BatchFeed(batches, at.micro_batch_size, at.step, steps, accumulate, recipe.data.num_workers, report)
    if recipe.model.gradient_checkpointing and feed.batches.micro_batch_size != NO_LIMIT:
        report(
            "Warning: model.gradient_checkpointing and micro_batch both save memory by one more forward pass; together "
            "they are for where a single pair does not fit without the first."
        )
    named = output / f"quarantine{f'-{rank}' if rank else ''}.jsonl"
    quarantine = Quarantine(named, recipe.data.max_bad_fraction, at.num_bad_records, at.num_records)
    log = MetricsLogger(output, accelerator, name, at.step) if rank == 0 else None
    examination = Validator(recipe, model, joint, evaluate, rank)
    set_rng_state(at.rng_state)

    with catch_stop_signals() as stop, disk_full_errors(output):
        bar = tqdm(range(at.step + 1, steps + 1), "train", steps, initial=at.step, unit="step", disable=log is None)
        for step in bar:
            # Both losses of each contrastive batch, and their gradient summed over batches and processes; where that
            # overflows and the loss does not, once more under half the scale.
            measure = step in (1, steps) or (recipe.logging_steps > 0 and step % recipe.logging_steps == 0)
            parts = [quarantine.record(batch) for batch in next(feed)]
            scale, drawn = at.loss_scale, get_rng_state()
            while True:
                losses = run_step_with_oom_retry(joint, parts, feed, measure, scale.factor)
                lm = torch.stack([each.lm for each in losses]).mean()
                contrastive = torch.stack([each.contrastive for each in losses]).mean()
                loss = objective.lm_weight * lm + objective.contrastive_weight * contrastive
                if zero:
                    norm = zero.sum_gradients(scale.factor)
                else:
                    unscale(trained, scale.factor)
                    all_reduce_gradients(trained)
                    norm = clip_grad_norm_(trained, clip)
                finite = all_reduce_max(not (loss.isfinite() and norm.isfinite()), device) == 0
                if finite or scale.factor == 1 or all_reduce_max(not loss.isfinite(), device):
                    break
                scale = scale.backoff()
                report(f"The gradient overflows at step {step}: again with the loss scaled by {scale.factor:.0f}.")
                joint.zero_grad()
                set_rng_state(drawn)

            # One step down the gradient, if it is one; if not, the scale had no part in it.
            rate = set_learning_rates(optimizer, schedule(step - 1))
            if finite:
                (zero or optimizer).step()
                at.loss_scale = scale.update()
            optimizer.zero_grad()

            # What is to be known of it.
            at.step = step
            if not finite:
                skip_nonfinite_step(at, joint, feed.batches, accumulate, recipe.max_nonfinite_steps, log)
            elif measure and log:
                values = {
                    "loss": loss.item(),
                    "lm_loss": lm.item(),
                    "contrastive_loss": contrastive.item(),
                    "temperature": losses[0].temperature.item(),
                    "grad_norm": norm.item(),
                    **losses[0].metrics,
                    "lr": rate,
                }
                log.write(step, values)
                bar.set_postfix({key: f"{values[key]:.3f}" for key in ("lm_loss", "contrastive_loss", "accuracy")})
            if examination.should_run(step):
                examination(at, log)

            # Where it stands, so that nothing is lost.
            asked = all_reduce_max(stop.signal, device)
            if asked or (recipe.save_steps and step % recipe.save_steps == 0):
                at = replace(
                    at,
                    micro_batch_size=feed.measured_size,
                    num_bad_records=quarantine.num_bad,
                    num_records=quarantine.num_records,
                    rng_state=get_rng_state(),
                )
                checkpointing.save(output / STATE, joint, optimizer, at, recipe.save_total_limit)
            if asked:
                raise RunInterrupted(
                    f"Stopped after step {step} of {steps}, which is saved; the same command goes on.", asked
                )

        weights = full_state_dict(model.lvlm)
        bad, seen = all_reduce_sum_(torch.tensor([quarantine.num_bad, quarantine.num_records], device=device)).tolist()
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
