"""A step whose loss or gradient is not finite is left out, and its records are named."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from cafe.data.dataset import Batch, ContrastiveBatchDataset, MicroBatchSize
from cafe.errors import CafeError
from cafe.training.checkpointing import TrainerState
from cafe.training.fsdp import unsharded
from cafe.training.metrics_log import MetricsLogger
from cafe.training.step import JointStep
from cafe.utils.distributed import all_gather_object

ONE_EXAMPLE = MicroBatchSize(tokens=1)  # one example a micro-batch


def skip_nonfinite_step(
    at: TrainerState,
    joint: JointStep,
    batches: ContrastiveBatchDataset,
    accumulate: int,
    largest: int,
    log: MetricsLogger | None,
) -> None:
    """Counts and logs a step that is left out.

    Raises:
        CafeError: it is number `largest` of them.
    """
    at.num_nonfinite += 1
    records = find_nonfinite_records(joint, batches, range((at.step - 1) * accumulate, at.step * accumulate))
    if log:
        log.write(at.step, {"skipped": at.num_nonfinite, "records": records})
    if at.num_nonfinite >= largest:
        others = f" and {len(records) - 3} others" if len(records) > 3 else ""
        raise CafeError(
            f"The loss or its gradient was not finite in {at.num_nonfinite} steps, the last of them step {at.step} on "
            f"{', '.join(records[:3])}{others}; log.jsonl names the records of each."
        )


@torch.no_grad()
def find_nonfinite_records(joint: JointStep, batches: ContrastiveBatchDataset, numbers: Iterable[int]) -> list[str]:
    """The records, of all processes, from which the model makes something that is not finite.

    Where it makes nothing of the sort from any of them alone, all of them: then it came of the gradient.
    """
    found: list[str] = []
    seen: list[str] = []
    for number in numbers:
        batch = batches.with_micro_batch_size(ONE_EXAMPLE)[number]
        for name, (vectors, said) in zip(batch.record_names, forward_micro_batches(joint, batch), strict=True):
            if not (vectors.isfinite().all() and said.isfinite()):
                found.append(name)
        seen += batch.record_names
    everywhere = [name for names in all_gather_object(found) for name in names]
    return everywhere or [name for names in all_gather_object(seen) for name in names]


def forward_micro_batches(
    joint: JointStep, batch: Batch
) -> list[tuple[Float[Tensor, "readouts dim"], Float[Tensor, ""]]]:
    """The embeddings and the summed language loss of each micro-batch. All processes must call it."""
    with unsharded(joint.packed_forward):  # without a backward pass, nothing else spreads the outermost weights again
        made = [joint.packed_forward(micro_batch.joint) for micro_batch in joint.pad_micro_batches(batch.micro_batches)]
    return made[: len(batch.micro_batches)]
