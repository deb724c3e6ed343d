"""Peak memory of a step under the gradient cache: as the contrastive batch grows, and beside the published step.

What is counted is what a step takes beyond the model and the batch; each measurement has a process of its own.

python benchmarks/memory.py [--json FILE] [--pairs 4096]
"""

import argparse
import ctypes
import gc
import math
import multiprocessing
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import torch
from common import Row, make_batch, make_pairs, show, tiny_llava
from published import step_a

from cafe.data.batch import MicroBatchSize
from cafe.packing import PackingConfig
from cafe.training.recipe import ObjectiveConfig
from cafe.training.step import JointStep

MMAP_THRESHOLD = -3  # mallopt's parameter, numbered as in glibc's malloc.h
CHUNK_TOKENS = 1800  # of a micro-batch: about 6 pairs
FEW, BESIDE_A = 64, 128  # pairs


def measure(published: bool, pairs: int) -> float:
    """Measure the bytes that one step takes at its peak, once a small one has made the gradients."""
    give_back_what_is_freed()
    model = tiny_llava()
    step = JointStep(model, ObjectiveConfig())
    small, sides = make_pairs(4), make_pairs(pairs)
    warm = make_batch(small, PackingConfig(max_row_tokens=512), MicroBatchSize(tokens=CHUNK_TOKENS))
    batch = (
        None if published else make_batch(sides, PackingConfig(max_row_tokens=512), MicroBatchSize(tokens=CHUNK_TOKENS))
    )
    step.forward_backward(warm)
    gc.collect()
    with watched() as taken:
        if batch is None:
            step_a(model, sides)
        else:
            step.forward_backward(batch)
    return taken.bytes


def give_back_what_is_freed() -> None:
    """Give every tensor on a CPU pages of its own from here on, which go back to the system with it.

    So what the process has is what is in use, as a GPU's allocator reports it, and not what is kept for later.
    """
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)


@dataclass
class Taken:
    """Hold what some work took at its peak beyond what was in use before it, in bytes."""

    bytes: float = 0.0


@contextmanager
def watched() -> Iterator[Taken]:
    """Measure what is taken within it: by a GPU's allocator, or of a CPU's memory as it is seen every two milliseconds.

    The pages of files are left out, of which Linux drops those of libraries that were not used for some minutes.
    """
    taken = Taken()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield taken
        taken.bytes = torch.cuda.max_memory_allocated() - before
        return
    over, at_first = Event(), own_pages()

    def watch() -> None:
        while not over.wait(0.002):
            taken.bytes = max(taken.bytes, own_pages() - at_first)

    watching = Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield taken
    finally:
        over.set()
        watching.join()


def own_pages() -> float:
    """Read the bytes of this process's memory that belong to no file."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return float(found[1]) * 1024


def apart(published: bool, pairs: int) -> float:
    """Call `measure` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        taken = pool.apply(measure, (published, pairs))
    print(f"{'A' if published else 'ours'}, {pairs:,} pairs: {taken / 2**20:,.0f} MiB", flush=True)
    return taken


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4096, help="of the largest batch")
    options, _ = parser.parse_known_args()
    few, many = apart(False, FEW), apart(False, options.pairs)
    ours, a = apart(False, BESIDE_A), apart(True, BESIDE_A)
    exponent = math.log(many / few) / math.log(options.pairs / FEW)
    show(
        "Peak memory of a step beyond model and batch",
        [
            Row(f"6: growth exponent, {FEW} to {options.pairs:,} pairs", exponent, 0.10, 0.03, at_least=False),
            Row(f"7: ours / A, {BESIDE_A} pairs", ours / a, 0.15, 0.08, at_least=False),
        ],
    )


if __name__ == "__main__":
    main()
