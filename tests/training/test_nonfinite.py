"""A step that is not finite is skipped, counted and logged; its record is named, and too many stop the run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import PreTrainedModel

from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import open_source
from cafe.errors import CafeError
from cafe.lvlm.adapters import LoraSettings
from cafe.lvlm.forward import forward_packed
from cafe.lvlm.loading import load_processor
from cafe.lvlm.processing import ChatProcessor
from cafe.packing import PackedBatch
from cafe.training.loop import StepGradient, optimizer_step, train
from cafe.training.optimizer import trainable_parameters
from cafe.training.prepare import Run
from cafe.training.recipe import OptimizerConfig, Recipe


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    AcceleratorState._reset_state(True)


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    return replace(recipe, optimizer=OptimizerConfig(learning_rate=1e-3), batch_size=4)


def poison(recipe: Recipe, step: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the model's hidden states NaN wherever it sees the answer of one record; return the record's name."""
    (source,) = recipe.data.sources
    records = json.loads(Path(source.path).read_text())
    chat_processor = ChatProcessor(load_processor(recipe.model.base), recipe.prompts)
    batches = ContrastiveBatchDataset([open_source(source)], chat_processor, recipe.batch_size, recipe.seed)
    record = int(batches.order(0).records[(step - 1) * recipe.batch_size + 1])
    tokenizer = chat_processor.tokenizer
    answer = records[record]["conversations"][1]["value"].split()

    def broken(lvlm: PreTrainedModel, pack: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings, hidden = forward_packed(lvlm, pack)
        text = tokenizer.decode(pack.labels, skip_special_tokens=True)
        return embeddings, hidden * (torch.nan if "".join(answer) in "".join(text.split()) else 1.0)

    monkeypatch.setattr("cafe.training.step.forward_packed", broken)
    return f"record {record} "


def test_nonfinite_step_is_skipped_and_its_record_named(recipe, monkeypatch):
    name = poison(recipe, 2, monkeypatch)
    checkpoint = train(recipe, report=lambda line: None)
    log = [json.loads(line) for line in (checkpoint.parent / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert log[1]["skipped"] == 1 and "loss" not in log[1]
    assert len(log[1]["records"]) == 1 and name in log[1]["records"][0]
    assert all("loss" in line for line in (log[0], *log[2:]))
    assert all(weight.isfinite().all() for weight in load_file(checkpoint / "model.safetensors").values())


def test_too_many_nonfinite_steps_stop_the_run(recipe, monkeypatch):
    name = poison(recipe, 2, monkeypatch)
    with pytest.raises(CafeError, match=rf"not finite in 1 steps, most recently in step 2 on .*{name}"):
        train(replace(recipe, max_nonfinite_steps=1), report=lambda line: None)


def always_nonfinite(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(lvlm: PreTrainedModel, pack: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings, hidden = forward_packed(lvlm, pack)
        return embeddings, hidden * torch.nan

    monkeypatch.setattr("cafe.training.step.forward_packed", broken)


@pytest.mark.parametrize("save_steps", [0, 1])
def test_a_run_whose_every_step_was_skipped_ends_in_an_error_without_a_checkpoint(recipe, monkeypatch, save_steps):
    always_nonfinite(monkeypatch)
    run = replace(recipe, max_steps=2, save_steps=save_steps)  # fewer than max_nonfinite_steps
    sentence = "not finite in any of the 2 steps, so nothing was learned and no checkpoint was written"
    for _ in range(2):  # the same command again, too
        with pytest.raises(CafeError, match=sentence):
            train(run, report=lambda line: None)
        assert not Path(run.output, "checkpoint").exists()
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("save_steps", "step"), [(1, 1), (0, 4)], ids=["state", "checkpoint"])
@pytest.mark.parametrize("adapter", [None, LoraSettings(rank=2)], ids=["full", "adapter"])
def test_weights_that_an_update_made_infinite_are_never_saved(recipe, monkeypatch, save_steps, step, adapter):
    run = replace(recipe, save_steps=save_steps, model=replace(recipe.model, adapter=adapter))
    spoiled: list[str] = []

    def spoil(trained: Run, gradient: StepGradient, number: int) -> float:
        rate = optimizer_step(trained, gradient, number)
        if number == step:
            name, parameter = list(trainable_parameters(trained.joint).items())[-1]
            parameter.data.view(-1)[0] = torch.inf
            spoiled.append(name)
        return rate

    monkeypatch.setattr("cafe.training.loop.optimizer_step", spoil)
    with pytest.raises(CafeError) as error:
        train(run, report=lambda line: None)
    assert str(error.value).startswith(f"The weight {spoiled[0]} holds values that are not finite at step {step}")
    assert not Path(run.output, "checkpoint").exists()
    assert not list(Path(run.output).glob("state/*"))
