"""Real processes are killed at random instants, during saves too; the same command ends with the same weights."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from states import explain, remember, set_aside, states_of

from cafe.adapters import Adapter
from cafe.data.formats import Source
from cafe.errors import CafeError, Stopped
from cafe.training import checkpoints
from cafe.training.loop import train
from cafe.training.recipe import DataRecipe, ModelRecipe, ObjectiveRecipe, OptimizerRecipe, Recipe

STEPS = 8
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cafe.training.loop"])


@pytest.fixture(scope="module")
def recipe(random_base: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A model with dropout, so that random numbers matter; one record in three is bad, so that the quarantine does."""
    directory = tmp_path_factory.mktemp("survive")
    shutil.copytree(random_base, directory / "base")
    config = json.loads((directory / "base" / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.2
    (directory / "base" / "config.json").write_text(json.dumps(config))
    records = json.loads((scenes / "llava_train.json").read_text())
    for record in records[::3]:
        record["image"] = "nowhere.png"
    (directory / "data.json").write_text(json.dumps(records))
    return Recipe(
        output=str(directory / "unbroken"),
        model=ModelRecipe(base=str(directory / "base")),
        data=DataRecipe(
            sources=(Source(path=str(directory / "data.json"), images=str(scenes)),), workers=1, max_bad_share=0.9
        ),
        objective=ObjectiveRecipe(learn_temperature=True, hard_negatives=False),
        optimizer=OptimizerRecipe(learning_rate=1e-3),
        batch_size=4,
        steps=STEPS,
        log_every=1,
        save_every=2,
    )


@pytest.fixture(scope="module")
def unbroken(recipe: Recipe) -> Path:
    process = start(recipe)
    process.join()
    assert process.exitcode == 0
    return Path(recipe.output)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    AcceleratorState._reset_state(True)


def quietly(recipe: Recipe, largest_file: int = -1) -> None:
    """What the command does, in a process of its own."""
    if largest_file >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    else:
        remember(states_of(Path(recipe.output)))
    try:
        train(recipe, report=lambda line: None)
    except CafeError as error:
        Path(recipe.output, "said").write_text(str(error)[:largest_file])
        os._exit(1)
    except Stopped as stopped:
        os._exit(128 + stopped.signal)


def start(recipe: Recipe, largest_file: int = -1) -> BaseProcess:
    process = PROCESSES.Process(target=quietly, args=(recipe, largest_file))
    process.start()
    return process


def when(happens: Callable[[], bool], process: BaseProcess, number: int) -> int | None:
    """Sends a signal as soon as something happens; returns how the process ended."""
    while process.is_alive() and not happens():
        time.sleep(0.0005)
    if process.pid and process.is_alive():
        os.kill(process.pid, number)
    process.join(120)
    return process.exitcode


def log_of(output: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same(output: Path, unbroken: Path) -> None:
    one, other = (load_file(place / "checkpoint" / "model.safetensors") for place in (output, unbroken))
    alike = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert alike and log_of(output) == log_of(unbroken), explain(output, unbroken)
    for name in ("temperature", "steps"):
        records = [json.loads((place / "checkpoint" / "cafe.json").read_text()) for place in (output, unbroken)]
        assert records[0][name] == records[1][name]
    quarantines = [(place / "quarantine.jsonl").read_text() for place in (output, unbroken)]
    assert quarantines[0] == quarantines[1] and quarantines[0]


def test_a_run_killed_at_any_instant_ends_with_the_same_weights_log_and_quarantine(recipe, unbroken, tmp_path):
    broken = replace(recipe, output=str(tmp_path / "run"))
    output, seed = Path(broken.output), time.time_ns()
    chance = random.Random(seed)
    print(f"The instants are those of seed {seed}.")  # shown if it fails

    def logged(step: int) -> bool:
        return (output / "log.jsonl").is_file() and f'"step": {step},' in (output / "log.jsonl").read_text()

    def a_while_after(step: int) -> Callable[[], bool]:
        until: list[float] = []

        def happens() -> bool:
            if logged(step) and not until:
                until.append(time.monotonic() + 0.25 * chance.random())
            return bool(until) and time.monotonic() > until[0]

        return happens

    instants = [
        a_while_after(1),
        lambda: (output / "state" / ".partial").is_dir(),  # in the middle of a save
        a_while_after(3),
        lambda: (output / "state" / "step-000004").is_dir(),  # right after one, or while old ones are removed
        lambda: (output / ".checkpoint.partial").is_dir(),  # while the end is written
    ]
    for instant in instants:
        assert when(instant, start(broken), signal.SIGKILL) == -signal.SIGKILL
        assert not (output / "checkpoint").exists()
    set_aside(output)
    process = start(broken)
    process.join()
    assert process.exitcode == 0
    assert_same(output, unbroken)


def test_a_signal_to_stop_saves_and_the_same_command_goes_on(recipe, unbroken, tmp_path):
    stopped = replace(recipe, output=str(tmp_path / "run"), save_every=0)
    log = tmp_path / "run" / "log.jsonl"
    for number, step in ((signal.SIGTERM, 2), (signal.SIGINT, 4)):
        ended = when(
            lambda step=step: log.is_file() and len(log.read_text().splitlines()) >= step, start(stopped), number
        )
        assert ended == 128 + number
        assert list((tmp_path / "run" / "state").glob("step-*"))
    start(stopped).join()
    assert_same(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"name": "muon"}},
        {"optimizer": {"name": "adamw_8bit"}},
        {"model": {"adapter": Adapter(rank=4, dropout=0.1)}, "optimizer": {"vision_tower_learning_rate": None}},
        {"model": {"precision": "fp16"}, "objective": {"lm_weight": 100.0}},  # which overflows at first
    ],
    ids=["muon", "8-bit", "adapter", "fp16"],
)
def test_whatever_is_trained_and_whatever_trains_it_is_gone_on_with(recipe, tmp_path, changes):
    parts = {part: replace(getattr(recipe, part), **change) for part, change in changes.items()}
    changed = replace(recipe, **parts, steps=4)
    whole, broken = (replace(changed, output=str(tmp_path / name)) for name in ("whole", "broken"))
    state = tmp_path / "broken" / "state" / "step-000002"
    assert when(state.is_dir, start(broken), signal.SIGKILL) == -signal.SIGKILL
    set_aside(tmp_path / "broken")
    for run in (whole, broken):
        process = start(run)
        process.join()
        assert process.exitcode == 0
    one, other = (next((tmp_path / run / "checkpoint").glob("*model.safetensors")) for run in ("whole", "broken"))
    alike = one.name == other.name and one.read_bytes() == other.read_bytes()
    assert alike and log_of(tmp_path / "whole") == log_of(tmp_path / "broken"), explain(
        tmp_path / "broken", tmp_path / "whole"
    )


def test_a_damaged_state_is_named_and_the_one_before_it_is_used(recipe, unbroken, tmp_path):
    broken = replace(recipe, output=str(tmp_path / "run"))
    state = tmp_path / "run" / "state"
    when(lambda: (state / "step-000004").is_dir(), start(broken), signal.SIGKILL)
    assert (state / "step-000002").is_dir()
    weights = next((state / "step-000004").glob("*.distcp"))
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    said: list[str] = []
    train(broken, report=said.append)
    assert any("step-000004 is damaged" in line and weights.name in line for line in said)
    assert "Going on after step 2." in said
    assert_same(tmp_path / "run", unbroken)


def test_a_full_disk_is_one_sentence_and_leaves_the_state_before(recipe, unbroken, tmp_path):
    broken = replace(recipe, output=str(tmp_path / "run"))
    when(lambda: (tmp_path / "run" / "state" / "step-000002").is_dir(), start(broken), signal.SIGKILL)
    process = start(broken, largest_file=1_000_000)  # bytes, less than the weights take
    process.join()
    assert process.exitcode == 1
    said = (tmp_path / "run" / "said").read_text()
    assert "could not be saved" in said and "File too large" in said and "\n" not in said
    assert [path.name for path in sorted((tmp_path / "run" / "state").iterdir())] == ["step-000002"]
    start(broken).join()
    assert_same(tmp_path / "run", unbroken)


def test_a_finished_run_is_left_and_another_recipe_is_refused_in_its_place(recipe, unbroken):
    before = (unbroken / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    said: list[str] = []
    assert train(replace(recipe, log_every=7), report=said.append) == unbroken / "checkpoint"
    assert len(said) == 1 and "nothing is left to do" in said[0]
    assert (unbroken / "checkpoint" / "model.safetensors").stat().st_mtime_ns == before
    assert not (unbroken / "state").exists()
    with pytest.raises(CafeError, match=r"optimizer.learning_rate was 0.001 and is 0.1.*give another output, or"):
        train(replace(recipe, optimizer=OptimizerRecipe(learning_rate=0.1)))


def test_the_last_states_are_kept_and_no_more(recipe, tmp_path):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    for step in range(1, 5):
        checkpoints.save(tmp_path, module, optimizer, checkpoints.Position(step=step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004"]


@pytest.mark.parametrize("trained", [False, True])
def test_weights_and_optimizer_come_back_as_they_were(tmp_path, trained):
    """Also before the first step, and where a weight never had a gradient: then there is no state, and none comes."""

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
        module[2].weight.requires_grad_(False)
        return module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)

    def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module[:2](torch.randn(5, 3)).square().sum().backward()  # the last layer's bias has no gradient
        optimizer.step()
        optimizer.zero_grad()

    module, optimizer = make()
    if trained:
        step(module, optimizer)
    checkpoints.save(tmp_path, module, optimizer, checkpoints.Position(step=1), keep=1)
    again, other = make()
    again[2].weight.data.copy_(module[2].weight)  # frozen: the base model's
    position = checkpoints.load(tmp_path, again, other, print)
    assert position is not None and position.step == 1
    for one, two in ((module, optimizer), (again, other)):
        torch.manual_seed(0)
        step(one, two)
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
