"""Kill `cafe train` at random instants and start the same command again, until as many kills are done as asked for.

Runs of a tiny model with dropout, over records of which some are bad, are compared with one that was never killed: the
weights bit for bit, the log line for line, the quarantine file. Of four kills one comes anywhere, two come while steps
are taken, and one as soon as a save has begun.

python benchmarks/kills.py [--kills 20] [--seed 0]
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from common import machine
from safetensors.torch import load_file
from tqdm import tqdm

from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import Prompts
from cafe.scenes.base import MODEL, corpus
from cafe.scenes.tiny_llava import make_model, make_processor
from cafe.scenes.write import write_scenes

STEPS, SAVE_STEPS = 12, 2


def prepare(directory: Path) -> Path:
    """Write a recipe, its model and its data."""
    torch.manual_seed(0)
    processor = make_processor(corpus(0, 100), MODEL)
    model = make_model(processor, MODEL)
    model.config.text_config.attention_dropout = 0.1
    model.save_pretrained(directory / "base")
    ChatProcessor(processor, Prompts()).save(directory / "base")
    write_scenes(directory / "scenes", train=48, test=8, report=lambda line: None)
    records = json.loads((directory / "scenes" / "llava_train.json").read_text())
    for record in records[::5]:
        record["image"] = "nowhere.png"
    (directory / "scenes" / "records.json").write_text(json.dumps(records))
    recipe = {
        "output": str(directory / "unbroken"),
        "model": {"base": str(directory / "base")},
        "data": {"sources": [{"path": str(directory / "scenes" / "records.json")}], "max_bad_fraction": 0.9},
        "optimizer": {"learning_rate": 1e-3},
        "objective": {"learn_temperature": True},
        "batch_size": 4,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "logging_steps": 1,
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return directory / "recipe.yaml"


def start(recipe: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start the command, in a process group of its own with its loader worker."""
    command = [sys.executable, "-m", "cafe", "train", str(recipe), f"output={output}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, start_new_session=True, **quiet)  # type: ignore[call-overload]


def kill(process: subprocess.Popen[bytes], happens: Callable[[], bool]) -> bool:
    """Send SIGKILL once something happens, and tell whether the process had not ended before."""
    while process.poll() is None and not happens():
        time.sleep(0.0005)
    if process.poll() is None:
        process.kill()
    return process.wait() == -signal.SIGKILL


def fresh(path: Path, since: float) -> bool:
    """Tell whether something was written there after a time."""
    try:
        return path.stat().st_mtime >= since
    except FileNotFoundError:
        return False


def saving(output: Path, since: float) -> bool:
    """Tell whether a save has begun after a time, and is not done."""
    return fresh(output / "state" / ".partial", since) or fresh(output / ".checkpoint.partial", since)


def instant(output: Path, kind: int, began: float, chosen: float, whole: float, loop: float) -> Callable[[], bool]:
    """Choose when to kill a run that began then: after a chosen share (0 to 1) of its seconds, or as a save begins."""
    stepping: list[float] = []  # since when

    def happens() -> bool:
        if kind == 0:
            return time.time() > began + chosen * whole
        if kind == 3:
            return saving(output, began)
        if not stepping and fresh(output / "log.jsonl", began):
            stepping.append(time.time())
        return bool(stepping) and time.time() > stepping[0] + chosen * loop

    return happens


def where(output: Path, since: float) -> str:
    """Describe what a killed run left."""
    log = output / "log.jsonl"
    steps = len(log.read_text().splitlines()) if log.is_file() else 0
    states = sorted(path.name for path in (output / "state").glob("step-*"))
    left = f"{steps:2} steps logged, {states[-1] if states else 'nothing'} saved"
    return left + (", in a save" if saving(output, since) else "")


def differences(output: Path, unbroken: Path) -> list[str]:
    """List in what two finished runs differ."""
    one, other = (load_file(run / "checkpoint" / "model.safetensors") for run in (output, unbroken))
    found = [name for name in other if name not in one or not torch.equal(one[name], other[name])]
    for name in ("log.jsonl", "quarantine.jsonl"):
        lines = [[json.loads(line) for line in (run / name).read_text().splitlines()] for run in (output, unbroken)]
        for line in lines[0] + lines[1]:
            line.pop("seconds", None)
        found += [name] if lines[0] != lines[1] else []
    return found


def main() -> None:
    """Print a line per kill, and the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        recipe = prepare(directory)
        unbroken = directory / "unbroken"
        started = time.monotonic()
        assert start(recipe, unbroken).wait() == 0
        whole = time.monotonic() - started
        loop = json.loads((unbroken / "log.jsonl").read_text().splitlines()[-1])["seconds"]
        print(f"on {machine()}\nunbroken: {STEPS} steps, a save every {SAVE_STEPS}, {whole:.0f} s\n")
        kills = runs = broken = 0
        output = directory / "run"
        bar = tqdm(total=options.kills, desc="kills", unit="kill")
        while kills < options.kills:
            began = time.time()
            process = start(recipe, output)
            happens = instant(output, kills % 4, began, chance.random(), whole, loop)
            if kill(process, happens):
                kills += 1
                bar.update()
                tqdm.write(f"kill {kills:2}: {where(output, began)}")
                continue
            runs, broken = runs + 1, broken + bool(report(output, unbroken))
            shutil.rmtree(output)
        assert start(recipe, output).wait() == 0
        runs, broken = runs + 1, broken + bool(report(output, unbroken))
        print(f"\n{kills} kills over {runs} runs; {runs - broken} of {runs} runs ended exactly as the unbroken one")
        print(f"{kills} kills, {kills if not broken else 0} exact resumes")
        sys.exit(1 if broken else 0)


def report(output: Path, unbroken: Path) -> list[str]:
    """Report how a run ended."""
    found = differences(output, unbroken)
    tqdm.write(f"the run ended {'otherwise: ' + ', '.join(found[:3]) if found else 'exactly as the unbroken one'}")
    return found


if __name__ == "__main__":
    main()
