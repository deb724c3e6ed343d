"""What happens to one of several real processes (gloo, on the CPU) happens to all: running out of memory, a signal."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RUN = """
import sys
from cafe.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
"""

# The second process is asked to stop in its first reading, and runs out of memory if it may.
TROUBLE = """
import os, signal, sys
import torch
from cafe.training import step

whole, seen = step.read, []

def read(lvlm, pack):
    if not seen and os.environ["RANK"] == "1":
        seen.append(pack)
        os.kill(os.getpid(), signal.SIGTERM)
        if "model.shard=true" not in sys.argv:
            raise torch.OutOfMemoryError("Out of memory")
    return whole(lvlm, pack)

step.read = read
"""


def run(recipe: Path, output: Path, world: int, before: str = "", shard: str = "false") -> tuple[list[int], str]:
    """The command in `world` processes, after some other code; returns their exit codes and what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(recipe), f"output={output}", f"batch_size={8 // world}", f"model.shard={shard}"]
    processes = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **place, "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", before + RUN, *arguments]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [process.communicate(timeout=300)[0].decode() for process in processes]
    return [process.returncode for process in processes], "\n".join(said)


@pytest.mark.parametrize("shard", ["false", "true"])
def test_out_of_memory_and_a_signal_in_one_process_are_everyones_and_the_run_goes_on(
    random_base, scenes, tmp_path, shard
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output: {tmp_path / 'run'}\nmodel: {{base: {random_base}}}\n"
        f"data: {{workers: 0, sources: [{{path: {scenes / 'llava_train.json'}}}]}}\n"
        # Large epsilon: AdamW's first steps would make a sign of every rounding error.
        "optimizer: {learning_rate: 1.0e-2, vision_tower_learning_rate: 1.0e-2, epsilon: 1.0e-2, warm_up: 0.0}\n"
        "objective: {learn_temperature: true}\nsteps: 2\nlog_every: 1\n"
    )
    codes, said = run(recipe, tmp_path / "run", 2, TROUBLE, shard)
    assert codes == [128 + signal.SIGTERM] * 2, said[-2000:]
    assert ("Memory ran out at step 1" in said) == (shard == "false")
    assert "Stopped after step 1 of 2, which is saved" in said
    (state,) = (tmp_path / "run" / "state").iterdir()
    assert {"process-0.pt", "process-1.pt", "manifest.json"} <= {path.name for path in state.iterdir()}
    codes, said = run(recipe, tmp_path / "run", 2, shard=shard)
    assert codes == [0, 0] and "Going on after step 1" in said, said[-2000:]

    codes, said = run(recipe, tmp_path / "alone", 1)
    assert codes == [0], said[-2000:]
    several, one, start = (
        load_file(place / "model.safetensors")
        for place in (tmp_path / "run" / "checkpoint", tmp_path / "alone" / "checkpoint", random_base)
    )
    moved = torch.cat([(one[name] - start[name]).flatten() for name in one])
    apart = torch.cat([(one[name] - several[name]).flatten() for name in one])
    assert moved.norm() > 0 and apart.norm() <= 1e-5 * moved.norm()
