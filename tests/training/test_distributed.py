"""Real processes (gloo, on the CPU) take the same steps as one with the same global batches."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS, GLOBAL_BATCH = 2, 8

RUN = """
import sys
import torch
from cafe.data.formats import Source
from cafe.data.loading import MicroBatchSize
from cafe.training.loop import train
from cafe.training.recipe import DataRecipe, ModelRecipe, ObjectiveRecipe, OptimizerRecipe, Recipe

base, data, output, batch, tokens, steps = sys.argv[1:]
torch.set_num_threads(1)
train(Recipe(
    output=output,
    model=ModelRecipe(base=base),
    data=DataRecipe(sources=(Source(path=data),), workers=0),
    # Large epsilon: AdamW's first steps would make a sign of every rounding error.
    optimizer=OptimizerRecipe(learning_rate=1e-2, vision_tower_learning_rate=1e-2, epsilon=1e-2, warm_up=0.0),
    objective=ObjectiveRecipe(learn_temperature=True),
    micro_batch=MicroBatchSize(tokens=int(tokens) or None),
    batch_size=int(batch),
    steps=int(steps),
    log_every=1,
))
"""


def run(base: Path, data: Path, output: Path, world: int, tokens: int) -> dict[str, torch.Tensor]:
    """Trains in `world` processes; returns the weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [base, data, output, GLOBAL_BATCH // world, tokens, STEPS]
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    processes = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        environment = {**os.environ, **(place | meeting if world > 1 else {})}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said.decode()[-2000:]
    return load_file(output / "checkpoint" / "model.safetensors")


@pytest.fixture(scope="module")
def one(random_base, scenes, tmp_path_factory):
    return run(random_base, scenes / "llava_train.json", tmp_path_factory.mktemp("one"), 1, 0)


@pytest.mark.parametrize(("world", "tokens"), [(2, 0), (2, 500), (4, 250)])
def test_several_processes_take_the_steps_of_one(one, random_base, scenes, tmp_path, world, tokens):
    several = run(random_base, scenes / "llava_train.json", tmp_path, world, tokens)
    start = load_file(random_base / "model.safetensors")
    assert one.keys() == several.keys()
    moved = torch.cat([(one[name] - start[name]).flatten() for name in one])
    apart = torch.cat([(one[name] - several[name]).flatten() for name in one])
    assert moved.norm() > 0 and apart.norm() <= 1e-5 * moved.norm()
