"""Steps whose loss or gradient is not finite: they are skipped, and the records responsible are named."""

from collections.abc import Iterable
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from cafe.data.batch import Batch, MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.errors import CafeError
from cafe.training.checkpointing import TrainerState
from cafe.training.fsdp import unsharded
from cafe.training.metrics_log import MetricsLogger
from cafe.training.micro_batching import BatchFeed
from cafe.training.step import JointStep
from cafe.utils.distributed import all_gather_object

ONE_EXAMPLE = MicroBatchSize(tokens=1)  # an example that is too large makes a micro-batch by itself


def skip_nonfinite_step(
    state: TrainerState, joint: JointStep, feed: BatchFeed, max_nonfinite_steps: int, log: MetricsLogger | None
) -> None:
    """Count and log the step that was just skipped.

    Raises:
        CafeError: it is number `max_nonfinite_steps` of them.
    """
    state.num_nonfinite += 1
    numbers = range((state.step - 1) * feed.accumulate, state.step * feed.accumulate)
    records = find_nonfinite_records(joint, feed.batches, numbers)
    if log:
        log.write(state.step, {"skipped": state.num_nonfinite, "records": records})
    if state.num_nonfinite < max_nonfinite_steps:
        return
    named = ", ".join(records[:3])
    if len(records) > 3:
        named += f" and {len(records) - 3} others"
    raise CafeError(
        f"The loss or its gradient was not finite in {state.num_nonfinite} steps, most recently in step {state.step} "
        f"on {named}; log.jsonl names the records of each step."
    )


@torch.no_grad()
def find_nonfinite_records(joint: JointStep, dataset: ContrastiveBatchDataset, numbers: Iterable[int]) -> list[str]:
    """Name the records, of all processes, whose embeddings or loss are not finite.

    If each of them alone is finite, the gradient was not: then all records are named.
    """
    # One example per forward pass tells which of them it is.
    nonfinite: list[str] = []
    names: list[str] = []
    for number in numbers:
        batch = dataset.with_micro_batch_size(ONE_EXAMPLE)[number]
        outputs = forward_micro_batches(joint, batch)
        for name, (embeddings, lm_loss_sum) in zip(batch.record_names, outputs, strict=True):
            names.append(name)
            is_finite = embeddings.isfinite().all() and lm_loss_sum.isfinite()
            if not is_finite:
                nonfinite.append(name)
    # The same in every process, so all of them gather the names or none does.
    nonfinite = _gather_names(nonfinite)
    if nonfinite:
        return nonfinite
    return _gather_names(names)


def _gather_names(names: list[str]) -> list[str]:
    """Return the names of all processes' records, by rank."""
    return list(chain.from_iterable(all_gather_object(names)))


def forward_micro_batches(
    joint: JointStep, batch: Batch
) -> list[tuple[Float[Tensor, "readouts dim"], Float[Tensor, ""]]]:
    """Return each micro-batch's embeddings and summed language modeling loss. All processes must call it."""
    # FSDP reshards the outermost weights after a backward pass, of which there is none here.
    with unsharded(joint.packed_forward):
        outputs = [
            joint.packed_forward(micro_batch.joint) for micro_batch in joint.pad_micro_batches(batch.micro_batches)
        ]
    return outputs[: len(batch.micro_batches)]
