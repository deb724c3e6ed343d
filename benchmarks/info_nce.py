"""InfoNCE over 16,384 pairs in chunks beside the whole similarity matrix: time, and memory beyond the embeddings.

python benchmarks/info_nce.py [--json FILE]
"""

import multiprocessing
import resource
import time

import torch
import torch.nn.functional as F
from common import Row, show
from torch import Tensor

from cafe.losses import info_nce

PAIRS, DIM, TEMPERATURE = 16384, 256, 0.05


def dense(queries: Tensor, targets: Tensor) -> Tensor:
    """Compute the loss as it is usually written."""
    logits = F.normalize(queries, dim=-1) @ F.normalize(targets, dim=-1).T / TEMPERATURE
    matches = torch.arange(len(queries))
    return (F.cross_entropy(logits, matches) + F.cross_entropy(logits.T, matches)) / 2


def chunked(queries: Tensor, targets: Tensor) -> Tensor:
    """Compute our loss."""
    return info_nce(queries, targets, TEMPERATURE)


def measure(name: str, repetitions: int) -> tuple[float, float, float]:
    """Measure (loss, seconds, extra peak memory in bytes) of forward and backward, in a process of its own."""
    torch.manual_seed(0)
    queries, targets = (torch.randn(PAIRS, DIM, requires_grad=True) for _ in range(2))
    work = {"dense": dense, "chunked": chunked}[name]
    work(queries[:64], targets[:64]).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repetitions):
        queries.grad = targets.grad = None
        started = time.perf_counter()
        loss = work(queries, targets)
        loss.backward()
        seconds.append(time.perf_counter() - started)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return loss.item(), sorted(seconds)[len(seconds) // 2], float(extra)


def main() -> None:
    """Print the table."""
    ratios = []
    for _ in range(3):  # interleaved, each in a fresh process, as peak memory never falls
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            one = pool.apply(measure, ("chunked", 3))
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            whole = pool.apply(measure, ("dense", 3))
        assert abs(one[0] - whole[0]) < 1e-4, (one[0], whole[0])
        ratios.append((one[1] / whole[1], one[2] / whole[2]))
        print(f"chunked {one[1]:.2f} s, {one[2] / 2**20:.0f} MiB; dense {whole[1]:.2f} s, {whole[2] / 2**20:.0f} MiB")
    show(
        f"InfoNCE over {PAIRS:,} pairs of {DIM} dimensions, forward and backward",
        [
            Row(
                "8: extra memory, chunked / dense",
                sorted(memory for _, memory in ratios)[1],
                0.10,
                0.05,
                at_least=False,
            ),
            Row("8: time, chunked / dense", sorted(seconds for seconds, _ in ratios)[1], 1.0, 0.5, at_least=False),
        ],
    )


if __name__ == "__main__":
    main()
