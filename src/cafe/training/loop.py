"""A run: the recipe's data through the joint step, step after step, to a checkpoint.

However a run is interrupted, the same command resumes it from the last saved state and ends with the same weights.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from cafe.data.batch import Batch
from cafe.errors import CafeError, RunInterrupted
from cafe.model import Cafe
from cafe.training import checkpointing
from cafe.training.device_memory import free_step_memory
from cafe.training.disk_full import disk_full_errors
from cafe.training.fsdp import full_state_dict
from cafe.training.gradients import unscale
from cafe.training.loss_scale import LossScale
from cafe.training.micro_batching import raise_if_sharded
from cafe.training.nonfinite import skip_nonfinite_step
from cafe.training.optimizer import set_learning_rates
from cafe.training.prepare import Run, prepare_run
from cafe.training.recipe import Recipe, recipe_dict
from cafe.training.run_directory import CHECKPOINT, STATE, is_finished
from cafe.training.signals import catch_stop_signals
from cafe.training.step import Losses
from cafe.utils.distributed import all_reduce_gradients, all_reduce_max, all_reduce_sum_, clip_grad_norm_
from cafe.utils.rng import get_rng_state, set_rng_state


@dataclass(frozen=True)
class StepGradient:
    """What a step's forward and backward passes made, besides the gradient in the parameters.

    Attributes:
        losses: of each batch of the step.
        lm, contrastive, loss: their means over the batches, and the weighted sum that is trained on.
        norm: of the gradient, before clipping.
        is_finite: whether the loss and the gradient are finite, in all processes.
        loss_scale: under which the gradient was computed.
    """

    losses: list[Losses]
    lm: Float[Tensor, ""]
    contrastive: Float[Tensor, ""]
    loss: Float[Tensor, ""]
    norm: Float[Tensor, ""]
    is_finite: bool
    loss_scale: LossScale


# A notebook may have switched gradients off for all that follows.
@torch.inference_mode(False)
@torch.enable_grad()
def train(
    recipe: Recipe,
    evaluate: Callable[[Cafe], dict[str, float]] | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Train by a recipe, write the checkpoint and return its directory.

    An interrupted run is resumed, and a finished one is left as it is. Gradients are computed even where the caller
    has switched them off.

    Args:
        recipe: the run.
        evaluate: measures the model every `recipe.evaluation.eval_steps` steps; its results are logged.
        report: called with lines for people.

    Raises:
        CafeError: the recipe, the data or the base model cannot be used; the output holds another run; too many steps
            were not finite; the disk is full.
        RunInterrupted: a signal asked the run to stop, and its state is saved.
    """
    checkpoint = Path(recipe.output) / CHECKPOINT
    if is_finished(recipe):
        report(f"{checkpoint} is already complete for this recipe; nothing to do.")
        return checkpoint
    run = prepare_run(recipe, evaluate, report)
    with catch_stop_signals() as stop, disk_full_errors(run.output):
        bar = progress_bar(run)
        for step in bar:
            log_step = should_log(run, step)
            gradient = gradient_with_retries(run, next_batches(run), log_step)
            learning_rate = optimizer_step(run, gradient, step)
            if not gradient.is_finite:
                skip_nonfinite_step(run.state, run.joint, run.feed, recipe.max_nonfinite_steps, run.log)
            elif log_step:
                log_metrics(run, gradient, learning_rate, bar)
            if is_due(step, recipe.evaluation.eval_steps):
                run.validator(run.state, run.log)
            # A signal that one process got stops all of them, after the same step.
            stop_signal = all_reduce_max(stop.signal, run.device)
            if stop_signal or is_due(step, recipe.save_steps):
                save_state(run)
            if stop_signal:
                raise RunInterrupted(
                    f"Stopped after step {step} of {run.num_steps}, which is saved; run the same command to resume.",
                    stop_signal,
                )
        _check_learned(run)
        export_checkpoint(run)
    run.accelerator.wait_for_everyone()
    return checkpoint


def _check_learned(run: Run) -> None:
    """Make sure that at least one step was taken.

    Raises:
        CafeError: every step was skipped.
    """
    if run.state.num_nonfinite >= run.num_steps:
        raise CafeError(
            f"The loss or its gradient was not finite in any of the {run.num_steps} steps, so nothing was learned and "
            "no checkpoint was written; log.jsonl names the records of each step."
        )


def progress_bar(run: Run) -> "tqdm[int]":
    """Return the numbers of the steps still to take, from 1, with a progress bar in the main process."""
    start = run.state.step
    steps = range(start + 1, run.num_steps + 1)
    return tqdm(steps, "train", run.num_steps, initial=start, unit="step", disable=run.log is None)


def should_log(run: Run, step: int) -> bool:
    """Return whether a step is logged: the first, the last and every `logging_steps`-th."""
    return step in (1, run.num_steps) or is_due(step, run.recipe.logging_steps)


def is_due(step: int, interval: int) -> bool:
    """Return whether what happens every `interval` steps happens after this one; with an interval of 0, never."""
    return interval > 0 and step % interval == 0


def next_batches(run: Run) -> list[Batch]:
    """Return the next step's batches, one per gradient accumulation step, and count their bad records."""
    return [run.quarantine.record(batch) for batch in next(run.feed)]


def gradient_with_retries(run: Run, batches: list[Batch], log_grad_norms: bool) -> StepGradient:
    """Compute the losses of a step's batches and their gradient, summed over processes and averaged over batches.

    A step starts over, with the same random numbers and nothing left of the failed try,

    - in micro-batches of half the size when memory runs out in any process;
    - with half the loss scale when the gradient overflows although the loss is finite.
    """
    loss_scale, rng_state = run.state.loss_scale, get_rng_state()
    while True:
        losses = _forward_backward(run, batches, log_grad_norms, loss_scale.factor)
        if losses is None:
            # Not in the handler, where the exception still holds the failed step's tensors.
            free_step_memory(run.joint)
            set_rng_state(rng_state)
            batches = run.feed.halve_micro_batch_size(batches, run.device)
            continue

        gradient = _reduce_gradient(run, losses, loss_scale)
        if not _has_overflowed(run, gradient):
            return gradient  # which may be not finite all the same: the caller skips such a step
        loss_scale = loss_scale.backoff()
        run.report(f"Step {run.feed.step}: gradient overflow; retrying with loss scale {loss_scale.factor:.0f}.")
        run.joint.zero_grad()
        set_rng_state(rng_state)


def _forward_backward(run: Run, batches: list[Batch], log_grad_norms: bool, loss_scale: float) -> list[Losses] | None:
    """Return each batch's losses, with the gradient left in the parameters; None if memory ran out in any process."""
    losses = []
    try:
        for index, batch in enumerate(batches):
            # The norms of each loss's gradient cost memory and time: one batch of the step stands for all.
            measure = log_grad_norms and index == 0
            losses.append(run.joint.forward_backward(batch, 1 / len(batches), measure, loss_scale))
    except torch.OutOfMemoryError:  # of this process or another: see `raise_oom_on_all_ranks`
        raise_if_sharded(run.joint)
        return None
    return losses


def _reduce_gradient(run: Run, losses: list[Losses], loss_scale: LossScale) -> StepGradient:
    """Average the losses, and sum the gradient over processes and clip it."""
    lm = torch.stack([each.lm for each in losses]).mean()
    contrastive = torch.stack([each.contrastive for each in losses]).mean()
    objective = run.recipe.objective
    loss = objective.lm_weight * lm + objective.contrastive_weight * contrastive
    if run.zero:
        norm = run.zero.sum_gradients(loss_scale.factor)
    else:
        unscale(run.trained, loss_scale.factor)
        all_reduce_gradients(run.trained)
        # Clipping needs the norm of the sum, so it comes last.
        norm = clip_grad_norm_(run.trained, run.recipe.optimizer.max_grad_norm)
    # All processes must skip the same steps.
    is_finite_here = bool(loss.isfinite() and norm.isfinite())
    is_finite = all_reduce_max(not is_finite_here, run.device) == 0
    return StepGradient(losses, lm, contrastive, loss, norm, is_finite, loss_scale)


def _has_overflowed(run: Run, gradient: StepGradient) -> bool:
    """Return whether a smaller loss scale may make the gradient finite, the same in all processes."""
    if gradient.is_finite:
        return False
    if gradient.loss_scale.factor == 1:
        return False
    # A loss that is not finite is unrelated to the scale, which multiplies it afterwards.
    return all_reduce_max(not gradient.loss.isfinite(), run.device) == 0


def optimizer_step(run: Run, gradient: StepGradient, step: int) -> float:
    """Take a step along a finite gradient, and count it either way; return the highest learning rate."""
    learning_rate = set_learning_rates(run.optimizer, run.schedule(step - 1))
    if gradient.is_finite:
        (run.zero or run.optimizer).step()
        # A gradient that is not finite at any scale says nothing about the scale.
        run.state.loss_scale = gradient.loss_scale.update()
    run.optimizer.zero_grad()
    run.state.step = step
    return learning_rate


def log_metrics(run: Run, gradient: StepGradient, learning_rate: float, bar: "tqdm[int]") -> None:
    """Log the losses, norms and rates of a step in the main process."""
    if run.log is None:
        return
    # Reading these numbers waits for the GPU, so only logged steps do.
    first = gradient.losses[0]  # the only one of the step whose metrics are measured
    values = {
        "loss": gradient.loss.item(),
        "lm_loss": gradient.lm.item(),
        "contrastive_loss": gradient.contrastive.item(),
        "temperature": first.temperature.item(),
        "grad_norm": gradient.norm.item(),
        **first.metrics,
        "lr": learning_rate,
    }
    run.log.write(run.state.step, values)
    bar.set_postfix({key: f"{values[key]:.3f}" for key in ("lm_loss", "contrastive_loss", "accuracy")})


def save_state(run: Run) -> None:
    """Save where the run stands, so that it can be resumed from here."""
    run.state = replace(
        run.state,
        micro_batch_size=run.feed.measured_size,
        num_bad_records=run.quarantine.num_bad,
        num_records=run.quarantine.num_records,
        num_truncated=run.quarantine.num_truncated,
        rng_state=get_rng_state(),
    )
    checkpointing.save(run.output / STATE, run.joint, run.optimizer, run.state, run.recipe.save_total_limit)


def export_checkpoint(run: Run) -> None:
    """Write the trained model's checkpoint from the main process, and remove the state that it makes useless."""
    checkpointing.check_finite_weights(run.joint, run.num_steps)
    # Both need all processes: a sharded model's weights, and the counts of bad records.
    weights = full_state_dict(run.model.lvlm)
    own = run.quarantine
    counts = torch.tensor([own.num_bad, own.num_records, own.num_truncated], device=run.device)
    num_bad, num_records, num_truncated = all_reduce_sum_(counts).tolist()
    if run.log is None:
        return
    run.model.lvlm.eval()
    temperature = run.joint.log_temperature.exp().item()
    metadata = {"temperature": temperature, "recipe": recipe_dict(run.recipe), "steps": run.num_steps}
    run.model.save(run.output / CHECKPOINT, weights, **metadata)
    shutil.rmtree(run.output / STATE, ignore_errors=True)  # only an unfinished run needs it
    run.log.close()
    cut = f" and {num_truncated} cut to model.max_length" if num_truncated else ""
    run.report(f"The checkpoint is in {run.output / CHECKPOINT}; {num_bad} of {num_records} records were bad{cut}.")
