"""Validation: the held-out loss is the dense one, the best checkpoint is kept, and training is not affected."""

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from cafe.content import Content
from cafe.data.source import Source
from cafe.errors import CafeError
from cafe.lvlm.prompts import Prompts
from cafe.model import Cafe
from cafe.training.loop import train
from cafe.training.precision import AUTOCAST_DTYPES
from cafe.training.recipe import DataConfig, EvaluationConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, Recipe
from cafe.training.step import JointStep
from cafe.training.validation import BATCH_SIZE, generate_samples, is_better, validation_dataset, validation_loss


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    AcceleratorState._reset_state(True)


@pytest.fixture
def recipe(random_base: Path, scenes: Path, tmp_path: Path) -> Recipe:
    source = Source(path=str(scenes / "llava_train.json"))
    return Recipe(
        output=str(tmp_path / "run"),
        model=ModelConfig(base=str(random_base)),
        data=DataConfig(sources=(source,), num_workers=0),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(sources=(source,), eval_steps=1, limit=BATCH_SIZE, num_samples=2),
        batch_size=2,
        max_steps=3,
        logging_steps=1,
    )


@torch.no_grad()
def test_validation_loss_is_the_dense_one_dialogue_by_dialogue(recipe, random_base, scenes):
    model = Cafe.load(random_base, Prompts(), torch.float32)
    batches = validation_dataset(recipe, model, rank=0)
    loss = validation_loss(JointStep(model.lvlm, ObjectiveConfig()), batches, recipe)
    total = tokens = 0.0
    for index in batches.order(0).records[:BATCH_SIZE]:
        row = model.encode_dialogue(batches.sources[0].example(int(index), Random(0)).dialogue)
        logits = model.lvlm(**model.chat_processor.collate([row])).logits[0, :-1]
        supervised = row.loss_mask[1:]
        total += F.cross_entropy(logits[supervised], row.input_ids[1:][supervised], reduction="sum").item()
        tokens += supervised.sum().item()
    assert loss == pytest.approx(total / tokens, rel=1e-4)
    first = json.loads((scenes / "llava_train.json").read_text())[int(batches.order(0).records[0])]
    samples = generate_samples(model, batches, 2)
    assert len(samples) == 2 and samples[0]["answer"] == first["conversations"][1]["value"]
    asked = model.generate_batch([Content.of([scenes / first["image"], samples[0]["asked"]])])
    assert samples[0]["said"] == asked[0]


def test_bad_record_is_no_sample(recipe, random_base, scenes, tmp_path):
    records = json.loads((scenes / "llava_train.json").read_text())
    model = Cafe.load(random_base, Prompts(), torch.float32)
    first = int(validation_dataset(recipe, model, rank=0).order(0).records[0])
    records[first]["image"] = "missing.png"
    (tmp_path / "some.json").write_text(json.dumps(records))
    held_out = EvaluationConfig(sources=(Source(path=str(tmp_path / "some.json"), images=str(scenes)),))
    samples = generate_samples(model, validation_dataset(replace(recipe, evaluation=held_out), model, rank=0), 2)
    assert len(samples) == 2 and not any(sample["record"].endswith(f"record {first}") for sample in samples)


def test_validation_is_logged_keeps_the_best_and_leaves_training_unchanged(recipe, tmp_path):
    results = iter([2.0, 3.0, 1.0])

    def evaluate(model: Cafe) -> dict[str, float]:
        assert not model.lvlm.training
        torch.rand(7)  # training must not notice
        return {"retrieval/text_to_image/R@1": next(results)}

    wanted = replace(recipe.evaluation, data=str(tmp_path))
    best = replace(recipe, evaluation=wanted, metric_for_best_model="retrieval/text_to_image/R@1")
    checkpoint = train(best, evaluate, report=lambda line: None)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    measured = [line for line in log if "held_out/lm_loss" in line]
    assert [line["retrieval/text_to_image/R@1"] for line in measured] == [2.0, 3.0, 1.0]
    assert all(len(line["samples"]) == 2 for line in measured)
    record = json.loads((tmp_path / "run" / "best" / "cafe.json").read_text())
    assert record["steps"] == 2 and record["results"]["retrieval/text_to_image/R@1"] == 3.0

    plain = replace(recipe, output=str(tmp_path / "plain"), evaluation=EvaluationConfig())
    unmeasured = load_file(train(plain, report=lambda line: None) / "model.safetensors")
    weights = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(weights[name], unmeasured[name]) for name in weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_validation_runs_under_the_training_autocast(recipe, precision):
    def evaluate(model: Cafe) -> dict[str, float]:
        [vector] = model.embed([Image.new("RGB", (64, 64), "red")])
        half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        return {"length": float(np.linalg.norm(vector)), "right": half == AUTOCAST_DTYPES.get(precision)}

    mixed = replace(recipe.model, precision=precision, frozen_weights_dtype=precision, freeze=("vision_tower",))
    train(replace(recipe, model=mixed), evaluate, report=lambda line: None)
    log = [json.loads(line) for line in (Path(recipe.output) / "log.jsonl").read_text().splitlines()]
    measured = [line for line in log if "samples" in line]
    assert [line["right"] for line in measured] == [True] * 3
    assert [line["length"] for line in measured] == pytest.approx([1.0] * 3)


def test_is_better_means_higher_or_lower_with_a_minus_sign():
    assert is_better({"a": 2.0}, "a", None) and is_better({"a": 2.0}, "a", 1.0) and not is_better({"a": 2.0}, "a", 2.0)
    assert is_better({"a": 2.0}, "-a", 3.0) and not is_better({"a": 2.0}, "-a", 1.0)
    assert not is_better({"a": math.nan}, "a", None) and not is_better({"a": math.inf}, "a", 1.0)
    assert is_better({"a": 2.0}, "a", math.nan) and is_better({"a": 2.0}, "-a", -math.inf)
    with pytest.raises(CafeError, match="no result b for metric_for_best_model; it has a"):
        is_better({"a": 2.0}, "b", None)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"evaluation": EvaluationConfig(eval_steps=1)}, "neither evaluation.data nor evaluation.sources is"),
        ({"evaluation": EvaluationConfig(), "metric_for_best_model": "a"}, "set evaluation.eval_steps too"),
    ],
)
def test_recipe_without_anything_to_evaluate_is_rejected(recipe, changes, sentence):
    with pytest.raises(CafeError, match=sentence):
        train(replace(recipe, **changes), report=lambda line: None)


def test_the_best_checkpoint_records_the_temperature_that_was_learned(recipe, tmp_path):
    wanted = replace(recipe.evaluation, data=str(tmp_path), eval_steps=2)
    learned = replace(
        recipe,
        evaluation=wanted,
        metric_for_best_model="a",
        objective=replace(recipe.objective, learn_temperature=True),
        max_steps=2,
    )
    checkpoint = train(learned, lambda model: {"a": 1.0}, report=lambda line: None)
    best, last = (Cafe.load(path).metadata["temperature"] for path in (tmp_path / "run" / "best", checkpoint))
    assert best == last != pytest.approx(0.05, abs=1e-6)
