"""Test the ablation: every arm trains from the same base, is measured, and is not trained twice."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from cafe.errors import RecipeError
from cafe.evaluation.ablation import ablate, format_table
from cafe.evaluation.suites import VQA
from cafe.training.recipe import EvaluationConfig, Recipe


@pytest.fixture
def recipe(recipe: Recipe, scenes: Path, tmp_path: Path) -> Recipe:
    AcceleratorState._reset_state(True)
    evaluation = EvaluationConfig(data=str(scenes))
    output = str(tmp_path / "ablation")
    return replace(recipe, output=output, evaluation=evaluation, batch_size=4, max_steps=1, trackers=None)


def test_every_arm_is_trained_and_measured_once(recipe, tmp_path, capsys):
    table = ablate(recipe, seeds=2, suites=["retrieval", "geometry"])
    output = tmp_path / "ablation"
    measured = json.loads((output / "ablation.json").read_text())
    assert {arm: len(runs) for arm, runs in measured.items()} == {
        "base": 1,
        "contrastive": 2,
        "language": 2,
        "joint": 2,
    }
    rows = {row.split(" | ")[0].strip("| "): re.findall(r"[\d.]+ ± [\d.]+", row) for row in table.splitlines()[2:]}
    for metric in ("retrieval/image_to_text/R@1", "geometry/modality_gap"):
        for cell, arm in zip(rows[metric], ("contrastive", "language", "joint"), strict=True):
            values = [run[metric] for run in measured[arm]]
            assert cell == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"

    weights = {
        arm: json.loads((output / f"{arm}-0" / "checkpoint" / "cafe.json").read_text())["recipe"]["objective"]
        for arm in ("contrastive", "language", "joint")
    }
    assert {arm: (loss["lm_weight"], loss["contrastive_weight"]) for arm, loss in weights.items()} == {
        "contrastive": (0.0, 1.0),
        "language": (1.0, 0.0),
        "joint": (1.0, 1.0),
    }

    written = {path: path.stat().st_mtime_ns for path in output.glob("*/checkpoint/*.safetensors")}
    assert len(written) == 6
    capsys.readouterr()
    assert ablate(recipe, seeds=2, suites=["retrieval", "geometry"]) == table
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_arms_are_evaluated_during_training_if_the_recipe_says_so(recipe, tmp_path):
    evaluation = replace(recipe.evaluation, eval_steps=1, limit=2)
    ablate(replace(recipe, evaluation=evaluation, metric_for_best_model="vqa/all"), seeds=1, suites=["vqa"])
    assert {path.parent.name for path in (tmp_path / "ablation").glob("*/best")} == {
        "contrastive-0", "language-0", "joint-0"
    }  # fmt: skip


def test_ablation_without_evaluation_data_is_refused(recipe):
    with pytest.raises(RecipeError, match=r"needs evaluation\.data"):
        ablate(replace(recipe, evaluation=EvaluationConfig()), seeds=1)


def test_the_table_has_the_headline_results_that_suites_declare():
    measured = {
        "base": [{"vqa/color": 1.0, "mine/score": 2.0, "vqa/all": 3.0}],
        "joint": [{"vqa/all": 4.0}, {"vqa/all": 6.0}],
    }
    mine = replace(VQA, name="mine", headline=("mine/*",))
    assert format_table(measured, [VQA, mine]).splitlines()[2:] == [
        "| vqa/all | 3.00 | 5.00 ± 1.41 |",
        "| mine/score | 2.00 | - |",
    ]
