"""Everything a run needs before its first step, made from the recipe in a fixed order."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from cafe.checkpoint import resolve_checkpoint
from cafe.data.batch import NO_LIMIT, MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.quarantine import Quarantine
from cafe.data.records import open_source
from cafe.errors import CheckpointError, RecipeError
from cafe.lvlm.adapters import has_adapter, is_adapter, merge
from cafe.lvlm.families import model_part
from cafe.lvlm.forward import set_kernel
from cafe.lvlm.image_size import set_max_image_size
from cafe.model import Cafe
from cafe.training import checkpointing
from cafe.training.build import build_dataset, build_step
from cafe.training.checkpointing import TrainerState
from cafe.training.compile import compile_layers
from cafe.training.deepspeed import DeepSpeedZero, uses_deepspeed
from cafe.training.fsdp import apply_fsdp, uses_fsdp
from cafe.training.loss_scale import FLOAT16, LossScale
from cafe.training.metrics_log import MetricsLogger, require_trackers
from cafe.training.micro_batching import BatchFeed, find_micro_batch_size
from cafe.training.optimizer import (
    cosine_schedule_with_warmup,
    make_optimizer,
    summarize_trainable,
    trainable_parameters,
)
from cafe.training.precision import AUTOCAST_DTYPES, loading_dtype
from cafe.training.recipe import ModelConfig, Recipe, no_negatives_warning
from cafe.training.run_directory import STATE, check_data, claim_run_directory
from cafe.training.step import JointStep
from cafe.training.validation import Validator
from cafe.utils.distributed import make_accelerator, mismatched_tensors, run_on_main_and_broadcast
from cafe.utils.rng import get_rng_state, set_rng_state

NUM_CHECKED_BATCHES = 8  # in which a batch of one pair is to have a hard negative

Evaluate = Callable[[Cafe], dict[str, float]]
Report = Callable[[str], None]


@dataclass
class Run:
    """A run in one process.

    Attributes:
        recipe: what to do.
        output: the run's directory.
        accelerator: the processes.
        report: called with lines for people; does nothing but in the main process.
        model: the model with its processor and prompts.
        joint: the joint step over the model.
        trained: the trained parameters, in shards where the model is sharded.
        optimizer: over them.
        zero: DeepSpeed's engine, in the place of gradient reduction and `optimizer.step`; None without it.
        schedule: the learning rate's factor by step, from 0.
        num_steps: the last step's number.
        feed: the batches, a step's at a time.
        quarantine: counts bad records.
        state: how far the run has come.
        log: the metrics log; None but in the main process.
        validator: evaluates the model during training.
    """

    recipe: Recipe
    output: Path
    accelerator: Accelerator
    report: Report
    model: Cafe
    joint: JointStep
    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    zero: DeepSpeedZero | None
    schedule: Callable[[int], float]
    num_steps: int
    feed: BatchFeed
    quarantine: Quarantine
    state: TrainerState
    log: MetricsLogger | None
    validator: Validator

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.joint.device


def prepare_run(recipe: Recipe, evaluate: Evaluate | None, report: Report) -> Run:
    """Prepare a run from its recipe, at its start or where it was last saved.

    Raises:
        CafeError: the recipe, the data or the base model cannot be used; the output holds another run.
    """
    set_seed(recipe.seed)
    output, config = Path(recipe.output), recipe.optimizer

    # What is wrong with the recipe or the launcher is found before anything is loaded.
    asks_for_shards, asks_for_zero = uses_fsdp(recipe.model.shard), uses_deepspeed(recipe)
    _check_evaluation(recipe, evaluate)
    accelerator = make_accelerator(log_with=require_trackers(recipe.trackers or ()), project_dir=output / "trackers")
    _check_attention(recipe, accelerator.device)
    several, is_main = accelerator.num_processes > 1, accelerator.is_main_process
    if not is_main:
        report = _ignore
    name = run_on_main_and_broadcast(lambda: claim_run_directory(recipe))

    # The batches, in an order fixed by the seed; the step over the model; its optimizer.
    model, dataset, joint, summary = _load(recipe, accelerator, asks_for_shards and several, report)
    trained = list(trainable_parameters(joint).values())
    optimizer = make_optimizer(joint, model.lvlm.config.model_type, config)
    zero = None
    if asks_for_zero and several:
        zero = DeepSpeedZero(trained, optimizer, config.max_grad_norm)
    num_steps = _count_steps(recipe, dataset)
    schedule = cosine_schedule_with_warmup(num_steps, config.warmup_ratio)
    report(f"{summary}; {num_steps} steps of {recipe.batch_size * accelerator.num_processes} pairs.")
    _warn_of_no_negatives(recipe, dataset, accelerator.num_processes, report)

    # Where the run was last saved, and what depends on that.
    state = _restore_state(recipe, joint, optimizer, report)
    if recipe.micro_batch == "auto" and not state.micro_batch_size:
        state.micro_batch_size = _measure_micro_batch_size(recipe, joint, dataset, report)
    feed = _make_feed(recipe, dataset, state, num_steps, report)
    quarantine = _open_quarantine(recipe, state, accelerator.process_index)
    log = MetricsLogger(output, accelerator, name, state.step) if is_main else None
    validator = Validator(recipe, model, joint, evaluate, accelerator.process_index)
    set_rng_state(state.rng_state)  # last, since some of the above draws random numbers
    return Run(
        recipe=recipe,
        output=output,
        accelerator=accelerator,
        report=report,
        model=model,
        joint=joint,
        trained=trained,
        optimizer=optimizer,
        zero=zero,
        schedule=schedule,
        num_steps=num_steps,
        feed=feed,
        quarantine=quarantine,
        state=state,
        log=log,
        validator=validator,
    )


def _ignore(line: str) -> None:
    """Report nothing: the main process does."""


def _check_evaluation(recipe: Recipe, evaluate: Evaluate | None) -> None:
    """Check that something measures the evaluation data that the recipe names."""
    wants_evaluation = recipe.evaluation.eval_steps and recipe.evaluation.data
    if wants_evaluation and not evaluate:
        raise RecipeError(
            "evaluation.eval_steps is set, but nothing measures evaluation.data: pass `train` a function that does, "
            "such as cafe.evaluation.runner.training_evaluator(recipe) makes."
        )


def _check_attention(recipe: Recipe, device: torch.device) -> None:
    """Check that the attention implementation can be trained on the device."""
    if recipe.model.attention == "flex_attention" and device.type == "cpu":
        raise RecipeError("model.attention: flex_attention has no backward pass on a CPU; use sdpa.")


def _load(
    recipe: Recipe, accelerator: Accelerator, sharded: bool, report: Report
) -> tuple[Cafe, ContrastiveBatchDataset, JointStep, str]:
    """Load the model and open the data; return them, the joint step on its device, and one line on what is trained."""
    config, rank = recipe.model, accelerator.process_index
    # The sources first: their files may be missing, and the model takes long.
    sources = [open_source(source, recipe.data.image_limits) for source in recipe.data.sources]
    run_on_main_and_broadcast(lambda: check_data(recipe, sources))
    # A sharded model goes to the GPU shard by shard: as a whole it may not fit there.
    device = torch.device("cpu") if sharded else accelerator.device
    base = resolve_checkpoint(config.base)
    if is_adapter(base):
        _check_can_merge(config, base)
    model = Cafe.load(
        base,
        recipe.prompts,
        loading_dtype(config),
        device,
        config.attention,
        config.frozen_weights_dtype == "4bit",
    )
    if has_adapter(model.lvlm):
        # Its matrices would stay frozen, and a model with an adapter saves that alone.
        merge(model.lvlm)
        report(f"{base} is an adapter: it was merged into its base model, and the sum is trained.")
    # The device may be another than the one it was loaded on.
    model.packing = set_kernel(model.packing, model.lvlm, accelerator.device, model.lvlm.dtype)
    model.metadata.clear()  # it describes the base model, which training changes
    set_max_image_size(model.lvlm, model.chat_processor.processor, config.max_image_pixels, config.image_grids)
    _warn_of_rounding(config, model, report)
    dataset = build_dataset(recipe, model, rank, accelerator.num_processes, sharded, sources, device=accelerator.device)
    joint = build_step(recipe, model, dataset.blank_micro_batch())
    _check_same_weights(joint, recipe, accelerator.device)
    summary = summarize_trainable(model.lvlm)  # while the weights are whole
    _move_to_device(joint, recipe, accelerator.device, sharded)
    return model, dataset, joint, summary


def _check_can_merge(config: ModelConfig, base: str) -> None:
    """Check that an adapter can be merged into its base before training.

    Raises:
        RecipeError: the base is quantized, or another adapter is to be trained on top.
    """
    advice = f"run `cafe merge {base} DIRECTORY` and set model.base to that directory."
    if config.adapter:
        raise RecipeError(f"model.base {base} has an adapter already, and model.adapter would train another: {advice}")
    if config.frozen_weights_dtype == "4bit":
        raise RecipeError(f"model.base {base} is an adapter, which 4-bit weights cannot take in: {advice}")


def _warn_of_rounding(config: ModelConfig, model: Cafe, report: Report) -> None:
    """Report it if frozen weights lose bits, and the checkpoint with them; that of an adapter does not hold them."""
    dtype = AUTOCAST_DTYPES.get(config.frozen_weights_dtype)
    if dtype is None or config.adapter:
        return
    for name, weight in model.lvlm.named_parameters():
        is_frozen = model_part(name, model.lvlm.config.model_type) in config.freeze
        if is_frozen and not torch.equal(weight, weight.to(dtype).to(weight.dtype)):
            report(
                f"Warning: model.frozen_weights_dtype: {config.frozen_weights_dtype} rounds the frozen weights of "
                f"{config.base}, which have more bits, in the checkpoint too; fp32 keeps them."
            )
            return


def _check_same_weights(joint: JointStep, recipe: Recipe, device: torch.device) -> None:
    """Make sure that all processes loaded the same weights: the gradients of different models would be summed."""
    mismatched = mismatched_tensors(joint.state_dict(), device)
    if not mismatched:
        return
    base = resolve_checkpoint(recipe.model.base)
    raise CheckpointError(
        f"The processes loaded different weights, {mismatched[0]} first: is {base} the same for all of them?"
    )


def _move_to_device(joint: JointStep, recipe: Recipe, device: torch.device, sharded: bool) -> None:
    """Move the step to the device, in shards if asked, and compile the layers if the recipe says so."""
    if sharded:
        # A cached vision tower does not run in every process at every step, which gathering its shards would need.
        whole = joint.vision.tower if joint.vision else None
        apply_fsdp(joint.packed_forward, device, joint.packed_forward.dtype, whole=whole)
    joint.to(device)
    if recipe.model.compile:
        compile_layers(joint.lvlm)


def _count_steps(recipe: Recipe, dataset: ContrastiveBatchDataset) -> int:
    """Return the number of optimizer steps that the recipe asks for, by itself or as passes over the data."""
    if recipe.max_steps:
        return recipe.max_steps
    # At least one: the data may be smaller than what a step accumulates.
    num_batches = recipe.num_train_epochs * len(dataset)
    return max(1, num_batches // recipe.optimizer.gradient_accumulation_steps)


def _warn_of_no_negatives(recipe: Recipe, dataset: ContrastiveBatchDataset, num_processes: int, report: Report) -> None:
    """Report it if pairs have nothing to be contrasted with, as far as the first batches show."""
    warning = no_negatives_warning(recipe, num_processes)
    if not warning:
        return
    first = [dataset[number] for number in range(min(NUM_CHECKED_BATCHES, len(dataset)))]
    if not any(len(batch.negative_owner) for batch in first):
        report(warning)


def _restore_state(recipe: Recipe, joint: JointStep, optimizer: torch.optim.Optimizer, report: Report) -> TrainerState:
    """Load the last saved state into the step and the optimizer, or return that of a run at its start."""
    state = checkpointing.load(Path(recipe.output) / STATE, joint, optimizer, report)
    if state is not None:
        if state.step:
            report(f"Resuming from step {state.step}.")
        return state
    # Gradients underflow in float16 alone: see `LossScale`.
    loss_scale = FLOAT16 if recipe.model.precision == "fp16" else LossScale()
    return TrainerState(loss_scale=loss_scale, rng_state=get_rng_state())


def _measure_micro_batch_size(
    recipe: Recipe, joint: JointStep, dataset: ContrastiveBatchDataset, report: Report
) -> MicroBatchSize:
    """Measure the size of micro-batches that fill the memory, and report it."""
    size = find_micro_batch_size(joint, dataset, recipe.memory_limit_gib)
    report(f"Micro-batches of {size.tokens or 'all'} tokens and {size.crops or 'all'} crops fit.")
    return size


def _make_feed(
    recipe: Recipe, dataset: ContrastiveBatchDataset, state: TrainerState, num_steps: int, report: Report
) -> BatchFeed:
    """Start loading batches after the last step taken."""
    accumulate, num_workers = recipe.optimizer.gradient_accumulation_steps, recipe.data.num_workers
    feed = BatchFeed(dataset, state.micro_batch_size, state.step, num_steps, accumulate, num_workers, report)
    if recipe.model.gradient_checkpointing and feed.batches.micro_batch_size != NO_LIMIT:
        report(
            "Warning: model.gradient_checkpointing and micro_batch both save memory at the cost of another forward "
            "pass; use both only if a single pair does not fit without gradient checkpointing."
        )
    return feed


def _open_quarantine(recipe: Recipe, state: TrainerState, rank: int) -> Quarantine:
    """Open the file of this process's bad records."""
    suffix = f"-{rank}" if rank else ""  # each process has its own records, and its own file
    path = Path(recipe.output) / f"quarantine{suffix}.jsonl"
    counts = (state.num_bad_records, state.num_records, state.num_truncated)
    return Quarantine(path, recipe.data.max_bad_fraction, *counts)
