"""What happens to one of several real processes (gloo, on the CPU) reaches all: out of memory, a stop signal."""

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
from cafe.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
"""

# The second process gets a stop signal in its first forward pass, and runs out of memory there unless sharded.
TROUBLE = """
import os, signal, sys
import torch
from cafe.training import step

forward, packs = step.forward_packed, []

def interrupted(lvlm, pack):
    if not packs and os.environ["RANK"] == "1":
        packs.append(pack)
        os.kill(os.getpid(), signal.SIGTERM)
        if "model.shard=true" not in sys.argv:
            raise torch.OutOfMemoryError("Out of memory")
    return forward(lvlm, pack)

step.forward_packed = interrupted
"""


def run(recipe: Path, output: Path, world: int, before: str = "", shard: str = "false") -> tuple[list[int], str]:
    """Run the command in `world` processes, after some other code; return their exit codes and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(recipe), f"output={output}", f"batch_size={8 // world}", f"model.shard={shard}"]
    processes = []
    for rank in range(world):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **ranks, "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", before + RUN, *arguments]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    output_text = [process.communicate(timeout=300)[0].decode() for process in processes]
    return [process.returncode for process in processes], "\n".join(output_text)


@pytest.mark.parametrize("shard", ["false", "true"])
def test_oom_and_stop_signal_in_one_process_reach_all_and_resume(random_base, scenes, tmp_path, shard):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output: {tmp_path / 'run'}\nmodel: {{base: {random_base}}}\n"
        f"data: {{num_workers: 0, sources: [{{path: {scenes / 'llava_train.json'}}}]}}\n"
        # Large epsilon: AdamW's first steps would make a sign of every rounding error.
        "optimizer: {learning_rate: 1.0e-2, vision_tower_learning_rate: 1.0e-2, epsilon: 1.0e-2, warmup_ratio: 0.0}\n"
        "objective: {learn_temperature: true}\nmax_steps: 2\nlogging_steps: 1\n"
    )
    codes, output_text = run(recipe, tmp_path / "run", 2, TROUBLE, shard)
    assert codes == [128 + signal.SIGTERM] * 2, output_text[-2000:]
    assert ("Step 1: out of memory" in output_text) == (shard == "false")
    assert "Stopped after step 1 of 2, which is saved" in output_text
    (state,) = (tmp_path / "run" / "state").iterdir()
    assert {"process-0.pt", "process-1.pt", "manifest.json"} <= {path.name for path in state.iterdir()}
    codes, output_text = run(recipe, tmp_path / "run", 2, shard=shard)
    assert codes == [0, 0] and "Resuming from step 1" in output_text, output_text[-2000:]

    codes, output_text = run(recipe, tmp_path / "alone", 1)
    assert codes == [0], output_text[-2000:]
    several, one, start = (
        load_file(directory / "model.safetensors")
        for directory in (tmp_path / "run" / "checkpoint", tmp_path / "alone" / "checkpoint", random_base)
    )
    moved = torch.cat([(one[name] - start[name]).flatten() for name in one])
    apart = torch.cat([(one[name] - several[name]).flatten() for name in one])
    assert moved.norm() > 0 and apart.norm() <= 1e-5 * moved.norm()
