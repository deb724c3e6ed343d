"""Resume: real processes are killed at random instants, during saves too, and still end with the same weights."""

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

from cafe.data.source import Source
from cafe.errors import CafeError, RunInterrupted
from cafe.lvlm.adapters import LoraSettings
from cafe.training import checkpointing
from cafe.training.loop import train
from cafe.training.recipe import DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, Recipe

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
        model=ModelConfig(base=str(directory / "base")),
        data=DataConfig(
            sources=(Source(path=str(directory / "data.json"), images=str(scenes)),),
            num_workers=1,
            max_bad_fraction=0.9,
        ),
        objective=ObjectiveConfig(learn_temperature=True, hard_negatives=False),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        batch_size=4,
        max_steps=STEPS,
        logging_steps=1,
        save_steps=2,
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
    """Do what the command does, in a process of its own."""
    if largest_file >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    else:
        remember(states_of(Path(recipe.output)))
    try:
        train(recipe, report=lambda line: None)
    except CafeError as error:
        Path(recipe.output, "error").write_text(str(error)[:largest_file])
        os._exit(1)
    except RunInterrupted as stopped:
        os._exit(128 + stopped.signal)


def start(recipe: Recipe, largest_file: int = -1) -> BaseProcess:
    process = PROCESSES.Process(target=quietly, args=(recipe, largest_file))
    process.start()
    return process


def when(happens: Callable[[], bool], process: BaseProcess, number: int) -> int | None:
    """Send a signal as soon as something happens; return how the process ended."""
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
    one, other = (load_file(run / "checkpoint" / "model.safetensors") for run in (output, unbroken))
    alike = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert alike and log_of(output) == log_of(unbroken), explain(output, unbroken)
    for name in ("temperature", "steps"):
        records = [json.loads((run / "checkpoint" / "cafe.json").read_text()) for run in (output, unbroken)]
        assert records[0][name] == records[1][name]
    quarantines = [(run / "quarantine.jsonl").read_text() for run in (output, unbroken)]
    assert quarantines[0] == quarantines[1] and quarantines[0]


def test_resume_after_kill_ends_with_the_same_weights_log_and_quarantine(recipe, unbroken, tmp_path):
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


def test_stop_signal_saves_and_the_same_command_resumes(recipe, unbroken, tmp_path):
    stopped = replace(recipe, output=str(tmp_path / "run"), save_steps=0)
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
        {"model": {"adapter": LoraSettings(rank=4, dropout=0.1)}, "optimizer": {"vision_tower_learning_rate": None}},
        {"model": {"precision": "fp16"}, "objective": {"lm_weight": 100.0}},  # which overflows at first
    ],
    ids=["muon", "8-bit", "adapter", "fp16"],
)
def test_resume_restores_every_optimizer_adapter_and_precision(recipe, tmp_path, changes):
    parts = {part: replace(getattr(recipe, part), **change) for part, change in changes.items()}
    changed = replace(recipe, **parts, max_steps=4)
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


def test_resume_skips_a_damaged_state_and_names_it(recipe, unbroken, tmp_path):
    broken = replace(recipe, output=str(tmp_path / "run"))
    state = tmp_path / "run" / "state"
    when(lambda: (state / "step-000004").is_dir(), start(broken), signal.SIGKILL)
    assert (state / "step-000002").is_dir()
    weights = next((state / "step-000004").glob("*.distcp"))
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    lines: list[str] = []
    train(broken, report=lines.append)
    assert any("damaged checkpoint" in line and "step-000004 (" in line and weights.name in line for line in lines)
    assert "Resuming from step 2." in lines
    assert_same(tmp_path / "run", unbroken)


def test_full_disk_is_reported_and_leaves_the_previous_state(recipe, unbroken, tmp_path):
    broken = replace(recipe, output=str(tmp_path / "run"))
    when(lambda: (tmp_path / "run" / "state" / "step-000002").is_dir(), start(broken), signal.SIGKILL)
    process = start(broken, largest_file=1_000_000)  # bytes, less than the weights take
    process.join()
    assert process.exitcode == 1
    error = (tmp_path / "run" / "error").read_text()
    assert "could not be saved" in error and "File too large" in error and "\n" not in error
    assert [path.name for path in sorted((tmp_path / "run" / "state").iterdir())] == ["step-000002"]
    start(broken).join()
    assert_same(tmp_path / "run", unbroken)


def test_finished_run_is_left_and_another_recipe_is_rejected(recipe, unbroken):
    before = (unbroken / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    lines: list[str] = []
    assert train(replace(recipe, logging_steps=7), report=lines.append) == unbroken / "checkpoint"
    assert len(lines) == 1 and "is already complete for this recipe; nothing to do." in lines[0]
    assert (unbroken / "checkpoint" / "model.safetensors").stat().st_mtime_ns == before
    assert not (unbroken / "state").exists()
    with pytest.raises(CafeError, match=r"optimizer.learning_rate was 0.001 and is 0.1.*set another output, or"):
        train(replace(recipe, optimizer=OptimizerConfig(learning_rate=0.1)))


def test_save_total_limit_keeps_the_last_states(recipe, tmp_path):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    for step in range(1, 5):
        checkpointing.save(tmp_path, module, optimizer, checkpointing.TrainerState(step=step), save_total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004"]


@pytest.mark.parametrize("trained", [False, True])
def test_saved_weights_and_optimizer_state_are_restored_exactly(tmp_path, trained):
    """Also before the first step, and for a weight that never had a gradient: it has no state, and gets none."""

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
    checkpointing.save(tmp_path, module, optimizer, checkpointing.TrainerState(step=1), save_total_limit=1)
    again, other = make()
    again[2].weight.data.copy_(module[2].weight)  # frozen: the base model's
    state = checkpointing.load(tmp_path, again, other, print)
    assert state is not None and state.step == 1
    for one, two in ((module, optimizer), (again, other)):
        torch.manual_seed(0)
        step(one, two)
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def saved_state(directory: Path) -> tuple[torch.nn.Module, torch.optim.Optimizer, Path]:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    checkpointing.save(directory, module, optimizer, checkpointing.TrainerState(step=1), save_total_limit=1)
    return module, optimizer, directory / "step-000001"


def test_a_state_that_would_lack_a_trained_weight_is_not_saved(tmp_path, monkeypatch):
    module, optimizer, _ = saved_state(tmp_path / "whole")
    whole = checkpointing._state_tensors

    def partial(*args: object) -> dict[str, object]:
        tensors = whole(*args)
        del tensors["weights"]["1.bias"]
        return tensors

    monkeypatch.setattr(checkpointing, "_state_tensors", partial)
    with pytest.raises(
        CafeError, match=r"could not be saved .*the weight 1\.bias, which is trained, is not in the files"
    ):
        checkpointing.save(tmp_path / "partial", module, optimizer, checkpointing.TrainerState(step=1), 1)
    assert not list((tmp_path / "partial").iterdir())


@pytest.mark.parametrize("text", ["", "5", "[]", '{"files": 5, "processes": 1}', '{"files": {}}', "[" * 100_000])
def test_a_broken_manifest_is_damage(tmp_path, text):
    module, optimizer, saved = saved_state(tmp_path)
    (saved / "manifest.json").write_text(text)
    lines: list[str] = []
    assert checkpointing.load(tmp_path, module, optimizer, lines.append) is None
    assert len(lines) == 1 and "it has no readable manifest.json" in lines[0]


class Runs:
    """What a pickle can do: write a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("kind", ["text", "list", "other fields", "code"])
def test_a_broken_trainer_state_ends_in_a_sentence_and_runs_nothing(tmp_path, kind):
    module, optimizer, saved = saved_state(tmp_path)
    mark = tmp_path / "was-run"
    objects = {"list": [1], "other fields": {"micro_batch_size": None, "loss_scale": {}, "more": 1}, "code": Runs(mark)}
    file = saved / "process-0.pt"
    if kind == "text":
        file.write_text("no state")
    else:
        torch.save(objects[kind], file)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["process-0.pt"] = checkpointing._digest(file)
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CafeError, match=rf"{file} is damaged, or of another version") as error:
        checkpointing.load(tmp_path, module, optimizer, print)
    assert "\n" not in str(error.value) and not mark.exists()
