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
from cafe.lvlm.forward import forward_packed
from cafe.lvlm.loading import load_processor
from cafe.lvlm.processing import ChatProcessor
from cafe.packing import PackedBatch
from cafe.training.loop import train
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
