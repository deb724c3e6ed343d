"""What a run starts from: an adapter is merged before its base is trained, and what cannot go well is told first."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from cafe.errors import CafeError
from cafe.lvlm.adapters import LoraSettings, has_adapter, merge
from cafe.model import Cafe
from cafe.training.loop import train
from cafe.training.recipe import ObjectiveConfig, OptimizerConfig, Recipe


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    AcceleratorState._reset_state(True)


@pytest.fixture
def first_stage(recipe: Recipe, tmp_path: Path) -> Path:
    """A run that trains an adapter with steps that are felt."""
    one = replace(
        recipe,
        output=str(tmp_path / "one"),
        model=replace(recipe.model, adapter=LoraSettings(rank=4)),
        optimizer=OptimizerConfig(learning_rate=3e-2),
        max_steps=3,
    )
    train(one, report=lambda line: None)
    AcceleratorState._reset_state(True)
    return Path(one.output)


def second_stage(recipe: Recipe, base: Path, **model) -> Recipe:
    return replace(recipe, output=recipe.output + "-two", model=replace(recipe.model, base=str(base), **model))


def test_a_second_stage_keeps_what_an_adapter_learned_and_saves_what_it_trains(recipe, first_stage):
    """The issue's first line: the base was trained in full, and the old adapter alone was saved."""
    merged = Cafe.load(first_stage / "checkpoint")
    learned = merged.embed(["a red circle"])
    merge(merged.lvlm)
    start = {name: parameter.detach().clone() for name, parameter in merged.lvlm.named_parameters()}
    base = dict(Cafe.load(recipe.model.base).lvlm.named_parameters())

    # With no steps worth the name, the second stage's model is the first's.
    lines: list[str] = []
    still = replace(
        second_stage(recipe, first_stage),
        optimizer=OptimizerConfig(learning_rate=0.0, vision_tower_learning_rate=0.0),
        max_steps=1,
    )
    checkpoint = train(still, report=lines.append)
    assert any("is an adapter: it was merged into its base model" in line for line in lines)
    model = Cafe.load(checkpoint)
    assert not has_adapter(model.lvlm) and not (checkpoint / "adapter_config.json").exists()
    np.testing.assert_allclose(model.embed(["a red circle"]), learned, atol=1e-5)

    # With steps, every weight that is trained moves from there, and the file holds it.
    AcceleratorState._reset_state(True)
    moved = replace(still, output=recipe.output + "-three", optimizer=OptimizerConfig(learning_rate=1e-3))
    found = dict(Cafe.load(train(moved, report=lambda line: None)).lvlm.named_parameters())
    adapted = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert (start[adapted] - base[adapted]).norm() > 10 * (found[adapted] - start[adapted]).norm() > 0
    assert sum(not torch.equal(found[name], start[name]) for name in start) > 0.9 * len(start)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"adapter": LoraSettings(rank=2)}, "has an adapter already, and model.adapter would train another"),
        (
            {"frozen_weights_dtype": "4bit", "precision": "bf16", "freeze": ("language_model",)},
            "is an adapter, which 4-bit weights cannot take in",
        ),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_with_the_command(recipe, first_stage, model, sentence):
    with pytest.raises(CafeError) as error:
        train(second_stage(recipe, first_stage, **model), report=lambda line: None)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert f"run `cafe merge {first_stage}/checkpoint DIRECTORY`" in str(error.value)
    assert not Path(recipe.output + "-two", "checkpoint").exists()


def test_a_base_that_is_not_finite_is_refused_before_training(recipe, tmp_path):
    Cafe.load(recipe.model.base).save(tmp_path / "base")
    from safetensors.torch import save_file

    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.model.norm.weight"][3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CafeError, match=r"The weight model\.language_model\.norm\.weight of .*base holds values that"):
        train(replace(recipe, model=replace(recipe.model, base=str(tmp_path / "base"))))


def flat(recipe: Recipe, tmp_path: Path, negatives: list[str]) -> Recipe:
    """Pairs of texts, with hard negatives or without."""
    rows = [{"query": f"a {n}", "positive": f"the {n}", "negatives": negatives} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = replace(recipe.data.sources[0], path=str(tmp_path / "pairs.jsonl"), format="pairs")
    return replace(recipe, data=replace(recipe.data, sources=(source,)), batch_size=1, max_steps=1)


@pytest.mark.parametrize(
    ("negatives", "weight", "size", "warns"),
    [([], 1.0, 1, True), (["no"], 1.0, 1, False), ([], 0.0, 1, False), ([], 1.0, 2, False)],
    ids=["alone", "hard negatives", "language", "two"],
)
def test_a_batch_of_one_pair_warns_once_and_points_to_batch_size(recipe, tmp_path, negatives, weight, size, warns):
    run = flat(recipe, tmp_path, negatives)
    run = replace(run, batch_size=size, objective=ObjectiveConfig(contrastive_weight=weight))
    if not weight:  # language needs dialogues
        run = replace(run, data=recipe.data)
    run = replace(run, optimizer=replace(run.optimizer, gradient_accumulation_steps=2))
    lines: list[str] = []
    train(run, report=lines.append)
    found = [line for line in lines if "batch_size: 1" in line]
    assert len(found) == warns
    for line in found:
        assert "Raise batch_size, and set micro_batch" in line and "gradient_accumulation_steps" in line
        log = json.loads(Path(run.output, "log.jsonl").read_text().splitlines()[0])
        assert log["contrastive_loss"] == 0 and log["accuracy"] == 1  # which the warning explains


@pytest.mark.parametrize("bits", ["float32", "bfloat16"])
def test_frozen_weights_that_lose_bits_in_the_checkpoint_are_told(recipe, tmp_path, bits):
    """What an earlier stage taught them may be too little for 16 bits."""
    Cafe.load(recipe.model.base, dtype=getattr(torch, bits)).save(tmp_path / "base")
    model = replace(
        recipe.model,
        base=str(tmp_path / "base"),
        precision="bf16",
        frozen_weights_dtype="bf16",
        freeze=("language_model",),
    )
    lines: list[str] = []
    train(replace(recipe, model=model, max_steps=1), report=lines.append)
    told = [line for line in lines if "rounds the frozen weights" in line]
    assert len(told) == (bits == "float32")
