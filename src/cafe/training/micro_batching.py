"""Micro-batches that fit: their size found by measurement, and halved where memory runs out all the same."""

import gc
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from cafe.data.batch import NO_LIMIT, Batch, MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.loader import iterate_batches
from cafe.errors import CafeError
from cafe.packing import count_crops, count_unique_tokens
from cafe.training.step import JointStep, Losses
from cafe.utils.distributed import all_reduce_max
from cafe.utils.rng import get_rng_state, set_rng_state

PROBE_EXAMPLES = 64  # examples among which the largest is sought
MEMORY_FRACTION = 0.9  # share of the memory that micro-batches may fill: allocators leave gaps, and batches differ
OPTIMIZER_BYTES_PER_PARAM = 8  # bytes of optimizer state a weight, as AdamW's two moments in float32 take


class BatchFeed:
    """The batches of a run, a step's at a time, cut to what fits.

    Args:
        batches: of the whole run.
        size: of micro-batches, found by measurement before; None for none. That of the batches holds as well.
        done, stop: the steps already taken, and the last one.
        accumulate: batches a step.
        workers: that make them ahead.
        report: takes the lines meant for people.
    """

    def __init__(
        self,
        batches: ContrastiveBatchDataset,
        size: MicroBatchSize | None,
        done: int,
        stop: int,
        accumulate: int,
        workers: int,
        report: Callable[[str], None],
    ) -> None:
        self.batches, self.measured_size = (
            batches.with_micro_batch_size(batches.micro_batch_size.within(size or NO_LIMIT)),
            size,
        )
        self.step, self.stop, self.accumulate = done, stop, accumulate
        self.workers, self.report = workers, report
        self.stream = self._load()

    def _load(self) -> Iterator[Batch]:
        start, stop = self.step * self.accumulate, self.stop * self.accumulate
        return iterate_batches(self.batches, start, stop, self.workers, self.report)

    def __next__(self) -> list[Batch]:
        """The batches of the next step."""
        self.step += 1
        return [next(self.stream) for _ in range(self.accumulate)]

    def halve_micro_batch_size(self, parts: list[Batch], device: torch.device) -> list[Batch]:
        """The same step's batches in micro-batches of half the size, as all later ones will be.

        Raises:
            CafeError: each example is a micro-batch already.
        """
        micro_batches = [micro_batch for part in parts for micro_batch in part.micro_batches]
        if not all_reduce_max(len(micro_batches) < sum(len(part.record_names) for part in parts), device):
            raise CafeError(
                f"Memory runs out over a single example at step {self.step}, one of "
                f"{', '.join(parts[0].record_names[:3])}: limit the size of pictures (model.max_image_pixels, model.image_grids) or of "
                "texts (model.max_length), or set model.gradient_checkpointing."
            )
        # This process may have no micro-batch: all its records were bad, and memory ran out in another.
        tokens = all_reduce_max(max((each.joint.num_tokens for each in micro_batches), default=0), device) // 2
        crops = all_reduce_max(max((num_crops(each.joint.inputs) for each in micro_batches), default=0), device)
        self.measured_size = MicroBatchSize(max(tokens, 1), max(crops // 2, 1) if crops else None)
        self.batches = self.batches.with_micro_batch_size(self.measured_size)
        size = f"{self.measured_size.tokens} tokens" + (
            f", {self.measured_size.crops} crops" if self.measured_size.crops else ""
        )
        self.report(f"Memory ran out at step {self.step}: again in micro-batches of {size}.")
        numbers = range((self.step - 1) * self.accumulate, self.step * self.accumulate)
        self.stream = self._load()
        return [self.batches[number] for number in numbers]


def run_step_with_oom_retry(
    joint: JointStep, parts: list[Batch], feed: BatchFeed, measure: bool, scale: float = 1.0
) -> list[Losses]:
    """A step's batches through the joint step, their gradients averaged; where memory runs out, again from the start.

    The same random numbers are drawn again, and nothing is left of the gradient that broke off. The list then holds
    the batches in their smaller micro-batches. `scale` is `JointStep`'s.
    """
    state = get_rng_state()
    while True:
        try:
            return [joint(batch, 1 / len(parts), measure and part == 0, scale) for part, batch in enumerate(parts)]
        except torch.OutOfMemoryError:  # of this process or another: see `within_memory`
            raise_if_sharded(joint)
        free_step_memory(joint)
        set_rng_state(state)
        parts[:] = feed.halve_micro_batch_size(parts, joint.log_temperature.device)


def raise_if_sharded(joint: JointStep) -> None:
    """Ends a run whose processes share a model: the others wait in the middle of a layer, and cannot begin again.

    Raises:
        CafeError: they do.
    """
    if joint.blank:
        raise CafeError(
            "Memory ran out in one of the processes that share the model, so that the step cannot be repeated: give a "
            "smaller micro_batch, and the same command goes on from the last saved state."
        ) from None


def free_step_memory(joint: JointStep) -> None:
    """Gives back the memory of a step."""
    joint.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def num_crops(inputs: dict[str, torch.Tensor]) -> int:
    """The crops among a model's inputs; 0 if they are patches of pictures of any size, of which tokens tell more."""
    pixels = inputs.get("pixel_values")
    return 0 if pixels is None else math.prod(pixels.shape[:-3] or [0])


def find_micro_batch_size(
    joint: JointStep, batches: ContrastiveBatchDataset, limit: float | None = None
) -> MicroBatchSize:
    """The size of micro-batches that fills the memory, measured with the largest of some examples.

    One example is read forward and back, then two, then four, until the next would not fit or all do. What a step takes
    grows with its tokens and crops in a straight line from there.

    Args:
        joint: the step; no gradient is left in it.
        batches: of the run.
        limit: the memory that this process may take in all, in GiB; by default what is free.

    Raises:
        CafeError: not even one example fits, or this machine does not tell how much memory is in use.
    """
    device = joint.log_temperature.device
    meter = MemoryMeter(device)
    state = get_rng_state()
    examples = batches.largest_examples(min(batches.batch_size, PROBE_EXAMPLES))
    examples = examples[: -all_reduce_max(-len(examples), device)]
    if not examples:
        raise CafeError("The first records are all bad: there is nothing to measure micro_batch: auto with.")
    sizes = [(count_unique_tokens(example.all), count_crops(example.all)) for example in examples]
    optimizer = OPTIMIZER_BYTES_PER_PARAM * sum(weight.numel() for weight in joint.parameters() if weight.requires_grad)
    start = meter.used()
    free = limit * 2**30 - start if limit else meter.free()
    room = MEMORY_FRACTION * free - optimizer
    fit, taken, count = 0, 0.0, 1
    while True:
        batch = batches.with_micro_batch_size(NO_LIMIT).collate(examples[:count])
        try:
            meter.reset()
            joint(batch, measure=True)  # as the first step, and all that are logged: these keep two gradients
            peak = meter.peak() - start
        except torch.OutOfMemoryError:
            raise_if_sharded(joint)
            peak = math.inf
        free_step_memory(joint)
        if all_reduce_max(peak > room, device):
            break
        fit, taken = count, peak
        if count == len(examples):
            break
        count = min(2 * count, len(examples))
    set_rng_state(state)
    if not fit:
        raise CafeError(
            f"The largest of {len(examples)} examples, {sizes[0][0]} tokens and {sizes[0][1]} crops, does not fit in "
            f"{max(room, 0) / 2**30:.1f} GiB: limit pictures (model.max_image_pixels, model.image_grids) or texts "
            "(model.max_length), or set model.gradient_checkpointing."
        )
    if fit == batches.batch_size:
        return NO_LIMIT
    more = room / max(taken, 1.0)  # what one example takes beside its tokens makes this an underestimate
    tokens, crops = (int(more * sum(size[part] for size in sizes[:fit])) for part in (0, 1))
    of_one_size = num_crops(batch.micro_batches[0].joint.inputs) > 0
    return MicroBatchSize(-all_reduce_max(-tokens, device), -all_reduce_max(-crops * of_one_size, device) or None)


class MemoryMeter:
    """Memory of a process on a device, in bytes: the GPU's own count, or what Linux tells of a process.

    Raises:
        CafeError: there is neither.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if not self.cuda and not Path("/proc/self/clear_refs").exists():
            raise CafeError("micro_batch: auto needs a GPU, or Linux to tell memory: give micro_batch.tokens instead.")

    def used(self) -> float:
        """What is in use now."""
        return float(torch.cuda.memory_allocated()) if self.cuda else _read_proc_kib("/proc/self/status", "VmRSS")

    def free(self) -> float:
        """What could be used besides. Beside a CPU's memory stand the loader workers and whoever else is there."""
        if self.cuda:
            return float(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
        return _read_proc_kib("/proc/meminfo", "MemAvailable")

    def reset(self) -> None:
        """Lets the peak begin anew."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        """The most that was in use since then."""
        return float(torch.cuda.max_memory_allocated()) if self.cuda else _read_proc_kib("/proc/self/status", "VmHWM")


def _read_proc_kib(file: str, name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path(file).read_text())
    return float(found[1]) * 1024 if found else 0.0
