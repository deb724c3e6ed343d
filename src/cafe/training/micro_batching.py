"""Micro-batches that fit into memory: their size is measured at the start, and halved where memory still runs out."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from cafe.data.batch import NO_LIMIT, Batch, MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.encoding import EncodedExample
from cafe.data.loader import iterate_batches
from cafe.errors import CafeError
from cafe.packing import count_crops, count_unique_tokens
from cafe.training.device_memory import MemoryMeter, free_step_memory
from cafe.training.optimizer import trainable_parameters
from cafe.training.step import JointStep
from cafe.utils.distributed import all_reduce_max, all_reduce_min
from cafe.utils.rng import get_rng_state, set_rng_state

PROBE_EXAMPLES = 64  # records among which the largest examples are taken
MEMORY_FRACTION = 0.9  # of the memory that micro-batches may fill: allocators leave gaps, and batches differ
OPTIMIZER_BYTES_PER_PARAM = 8  # AdamW's two moments in float32


class BatchFeed:
    """Iterates over the batches of a run, one step's at a time, in micro-batches that fit.

    Args:
        dataset: the batches of the whole run; its micro-batch size holds too.
        measured_size: the micro-batch size found by measurement before, if any.
        step: the last step already taken.
        last_step: the last step of the run.
        accumulate: batches per step.
        num_workers: loader processes.
        report: called with lines for people.
    """

    def __init__(
        self,
        dataset: ContrastiveBatchDataset,
        measured_size: MicroBatchSize | None,
        step: int,
        last_step: int,
        accumulate: int,
        num_workers: int,
        report: Callable[[str], None],
    ) -> None:
        size = dataset.micro_batch_size.within(measured_size or NO_LIMIT)
        self.batches, self.measured_size = dataset.with_micro_batch_size(size), measured_size
        self.step, self.last_step, self.accumulate = step, last_step, accumulate
        self.num_workers, self.report = num_workers, report
        self.stream = self._load()

    def _load(self) -> Iterator[Batch]:
        """Load the batches after the current step."""
        start, stop = self.step * self.accumulate, self.last_step * self.accumulate
        return iterate_batches(self.batches, start, stop, self.num_workers, self.report)

    def __next__(self) -> list[Batch]:
        """Return the batches of the next step."""
        self.step += 1
        return [next(self.stream) for _ in range(self.accumulate)]

    def halve_micro_batch_size(self, batches: Sequence[Batch], device: torch.device) -> list[Batch]:
        """Return the current step's batches in micro-batches of half the size; later ones will have it too.

        Raises:
            CafeError: every example is a micro-batch by itself already.
        """
        micro_batches = [micro_batch for batch in batches for micro_batch in batch.micro_batches]
        num_examples = sum(len(batch.record_names) for batch in batches)
        # In all processes: one of them may still have something to divide.
        if not all_reduce_max(len(micro_batches) < num_examples, device):
            raise CafeError(
                f"Step {self.step}: out of memory with a single example, one of "
                f"{', '.join(batches[0].record_names[:3])}: limit image size (model.max_image_pixels, "
                "model.image_grids) or text length (model.max_length), or set model.gradient_checkpointing."
            )

        # The largest of all processes: this one has no micro-batch if its records were all bad and another ran out.
        most_tokens = max((each.joint.num_tokens for each in micro_batches), default=0)
        most_crops = max((num_crops(each.joint.inputs) for each in micro_batches), default=0)
        tokens = max(all_reduce_max(most_tokens, device) // 2, 1)
        size = f"{tokens} tokens"
        crops: int | None = None
        if num_crops_before := all_reduce_max(most_crops, device):
            crops = max(num_crops_before // 2, 1)
            size += f", {crops} crops"
        self.measured_size = MicroBatchSize(tokens, crops)
        self.report(f"Step {self.step}: out of memory; retrying with micro-batches of at most {size}.")
        # Workers may have later batches in the old size ready: start them anew.
        self.batches = self.batches.with_micro_batch_size(self.measured_size)
        self.stream = self._load()
        return [self.batches[self.accumulate * (self.step - 1) + index] for index in range(self.accumulate)]


def raise_if_sharded(joint: JointStep) -> None:
    """Stop a sharded run that is out of memory: the other processes wait within a layer and cannot start over.

    Raises:
        CafeError: the run is sharded.
    """
    if joint.blank_micro_batch:
        raise CafeError(
            "Out of memory in one of the processes that share the model, so the step cannot be repeated: set a smaller "
            "micro_batch and run the same command to resume from the last saved state."
        ) from None


def num_crops(inputs: dict[str, torch.Tensor]) -> int:
    """Count the crops among a model's inputs: 0 if images are patches of any size, which tokens measure better."""
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return 0
    # The shape of crops ends with channels, height and width; patches have two dimensions.
    return math.prod(pixels.shape[:-3] or [0])


def find_micro_batch_size(
    joint: JointStep, dataset: ContrastiveBatchDataset, memory_limit_gib: float | None = None
) -> MicroBatchSize:
    """Find the micro-batch size that fills the memory.

    The largest examples are run forward and backward, and the memory that a step takes is extrapolated linearly in its
    tokens and crops.

    Args:
        joint: the step; no gradient is left in it.
        dataset: the batches of the run.
        memory_limit_gib: what this process may take in all, in GiB; by default what is free.

    Raises:
        CafeError: not even one example fits, or memory cannot be measured here.
    """
    device = joint.device
    meter = MemoryMeter(device)
    rng_state = get_rng_state()
    examples = dataset.largest_examples(min(dataset.batch_size, PROBE_EXAMPLES))
    examples = examples[: all_reduce_min(len(examples), device)]  # every process must run as many
    if not examples:
        raise CafeError("The first records are all bad: there is nothing to measure micro_batch: auto with.")

    # What a step may take: the optimizer makes its state after it.
    num_trained = sum(parameter.numel() for parameter in trainable_parameters(joint).values())
    used = meter.used()
    free = meter.free()
    if memory_limit_gib:
        free = memory_limit_gib * 2**30 - used
    room = MEMORY_FRACTION * free - OPTIMIZER_BYTES_PER_PARAM * num_trained

    peaks = probe(joint, dataset, examples, meter, used + room)
    set_rng_state(rng_state)
    if not peaks:
        tokens, crops = count_unique_tokens(examples[0].all), count_crops(examples[0].all)
        raise CafeError(
            f"The largest of {len(examples)} examples, {tokens} tokens and {crops} crops, does not fit in "
            f"{max(room, 0) / 2**30:.1f} GiB: limit image size (model.max_image_pixels, model.image_grids) or text "
            "length (model.max_length), or set model.gradient_checkpointing."
        )
    count, peak = peaks[-1]
    if count == dataset.batch_size:
        return NO_LIMIT  # a batch of the largest examples fits as a whole
    return extrapolate(dataset, examples[:count], room / max(peak - used, 1.0), device)


def probe(
    joint: JointStep,
    dataset: ContrastiveBatchDataset,
    examples: list[EncodedExample],
    meter: MemoryMeter,
    limit: float,
) -> list[tuple[int, float]]:
    """Run a step on the first example, then two, then four, until a process would exceed `limit` bytes.

    Returns:
        The number of examples and the peak memory, in bytes, of each step that fits.
    """
    whole = dataset.with_micro_batch_size(NO_LIMIT)
    fitting: list[tuple[int, float]] = []
    count = 1
    while True:
        batch = whole.collate(examples[:count])  # in one micro-batch
        try:
            meter.reset()
            joint.forward_backward(batch, log_grad_norms=True)  # as logged steps do: it keeps two gradients
            peak = meter.peak()
        except torch.OutOfMemoryError:
            raise_if_sharded(joint)
            peak = math.inf
        free_step_memory(joint)
        # All processes stop at the same count: a step needs all of them.
        if all_reduce_max(peak > limit, joint.device):
            return fitting
        fitting.append((count, peak))
        if count == len(examples):
            return fitting
        count = min(2 * count, len(examples))


def extrapolate(
    dataset: ContrastiveBatchDataset, examples: list[EncodedExample], factor: float, device: torch.device
) -> MicroBatchSize:
    """Return the size of micro-batches with `factor` times the tokens and crops of some examples, in all processes.

    The memory that one example takes besides its tokens makes this an underestimate.
    """
    # In every process: the one with the least room decides for all.
    tokens = int(factor * sum(count_unique_tokens(example.all) for example in examples))
    crops = int(factor * sum(count_crops(example.all) for example in examples))
    [micro_batch] = dataset.with_micro_batch_size(NO_LIMIT).collate(examples).micro_batches
    # Where images are patches, tokens measure them.
    if not num_crops(micro_batch.joint.inputs):
        crops = 0
    return MicroBatchSize(all_reduce_min(tokens, device), all_reduce_min(crops, device) or None)
