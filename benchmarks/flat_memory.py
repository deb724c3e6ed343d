"""Memory over a long run of varying sizes: it is what it was early on, whatever has gone through the model since.

Each step has another number of pairs, of other lengths of captions, and another size of micro-batches. What is shown is
the peak of each stretch of steps: resident memory on a CPU, PyTorch's allocated memory on a GPU.

python benchmarks/flat_memory.py [--json FILE] [--steps 350]
"""

import argparse
import random

import torch
from common import Row, make_batch, make_pairs, show, tiny_llava
from tqdm import tqdm

from cafe.data.batch import MicroBatchSize
from cafe.packing import PackingConfig
from cafe.training.device_memory import MemoryMeter
from cafe.training.recipe import ObjectiveConfig
from cafe.training.step import JointStep

STRETCH = 50  # steps


def main() -> None:
    """Print a line per stretch, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=350)
    options, _ = parser.parse_known_args()
    chance = random.Random(0)
    model = tiny_llava()
    step = JointStep(model, ObjectiveConfig())
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-5)
    meter = MemoryMeter(model.device)
    peaks = []
    for number in tqdm(range(1, options.steps + 1), "steps", unit="step"):
        sides = make_pairs(chance.randint(2, 8), seed=number, caption=chance.choice([16, 32, 64]))
        size = MicroBatchSize(tokens=chance.choice([None, 600, 1200]))
        if number % STRETCH == 1:
            meter.reset()
        step.forward_backward(make_batch(sides, PackingConfig(max_row_tokens=256), size))
        optimizer.step()
        optimizer.zero_grad()
        if number % STRETCH == 0:
            peaks.append(meter.peak())
            tqdm.write(f"steps {number - STRETCH + 1} to {number}: {peaks[-1] / 2**20:,.0f} MiB at the peak")
    late, early = peaks[-1], peaks[1]  # the first stretch also sees what is made once
    show("Memory over a long run", [Row("last stretch / second stretch", late / early, 1.1, 1.02, at_least=False)])


if __name__ == "__main__":
    main()
