"""Test the ablation: every arm trains from the same base, is measured, and is not trained twice."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from cafe.errors import RecipeError
from cafe.evaluation.ablation import ablate, arm_recipes, directory_name, format_table
from cafe.evaluation.suites import VQA
from cafe.training.recipe import EvaluationConfig, Recipe
from cafe.training.recipe_io import Sweep


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
    # Without a suite of generated text there is no chart, but there is a page.
    page = (output / "report.html").read_text()
    assert '<section id="arms">' in page and '<figure class="wide">' not in page
    assert not (output / "front.svg").exists()
    capsys.readouterr()
    assert ablate(recipe, seeds=2, suites=["retrieval", "geometry"]) == table
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_arms_are_evaluated_during_training_if_the_recipe_says_so(recipe, tmp_path):
    evaluation = replace(recipe.evaluation, eval_steps=1, limit=2)
    ablate(replace(recipe, evaluation=evaluation, metric_for_best_model="vqa/all"), seeds=1, suites=["vqa"])
    assert {path.parent.name for path in (tmp_path / "ablation").glob("*/best")} == {
        "contrastive-0", "language-0", "joint-0"
    }  # fmt: skip


def sweep_objective(recipe: Recipe, field: str, *values: str) -> Sweep:
    recipes = {value: replace(recipe, objective=replace(recipe.objective, **{field: float(value)})) for value in values}
    return Sweep(f"objective.{field}", recipes)


def test_a_sweep_trains_the_joint_arm_with_each_value_once(recipe, tmp_path):
    sweeps = [
        sweep_objective(recipe, "contrastive_weight", "3", "1", "0.5"),
        sweep_objective(recipe, "temperature", "0.05", "0.1"),
    ]
    table = ablate(recipe, 1, ["retrieval", "vqa"], sweeps, arms=["contrastive"])
    output = tmp_path / "ablation"
    measured = json.loads((output / "ablation.json").read_text())
    swept = [
        f"joint objective.{each}" for each in ("contrastive_weight=3", "contrastive_weight=0.5", "temperature=0.1")
    ]
    # The joint arm, which was not asked for, is a value of both sweeps; the language arm is of neither.
    assert list(measured) == ["base", "contrastive", "joint", *swept]
    assert table.startswith(f"| | {' | '.join(measured)} |")

    trained = {path.parts[-3] for path in output.glob("*/checkpoint/cafe.json")}
    assert trained == {"contrastive-0", "joint-0", *(f"{arm.replace(' ', '-')}-0" for arm in swept)}
    for name, weight, temperature in (
        ("joint-0", 1, 0.05),
        ("joint-objective.contrastive_weight=0.5-0", 0.5, 0.05),
        ("joint-objective.temperature=0.1-0", 1, 0.1),
    ):
        objective = json.loads((output / name / "checkpoint" / "cafe.json").read_text())["recipe"]["objective"]
        assert (objective["contrastive_weight"], objective["temperature"]) == (weight, temperature)

    page, front = (output / "report.html").read_text(), (output / "front.svg").read_text()
    assert '<figure class="wide">' in page and all(f"<th>{arm}</th>" in page for arm in measured)
    assert ">joint, by objective.contrastive_weight<" in front


def test_a_sweep_may_have_fewer_seeds(recipe, tmp_path):
    sweeps = [sweep_objective(recipe, "contrastive_weight", "1", "0.5")]
    ablate(replace(recipe, max_steps=1), 2, ["geometry"], sweeps, arms=["joint"], sweep_seeds=1)
    measured = json.loads((tmp_path / "ablation" / "ablation.json").read_text())
    numbers = {arm: len(runs) for arm, runs in measured.items()}
    assert numbers == {"base": 1, "joint": 2, "joint objective.contrastive_weight=0.5": 1}


def test_values_are_in_order_and_one_that_makes_another_arm_is_that_arm(recipe):
    weights = sweep_objective(recipe, "contrastive_weight", "10", "0", "2", "1.0", "2.0")
    precisions = {name: replace(recipe, model=replace(recipe.model, precision=name)) for name in ("fp32", "bf16")}
    recipes, values = arm_recipes(recipe, [weights, Sweep("model.precision", precisions)], ["joint"])
    two, ten = "joint objective.contrastive_weight=2", "joint objective.contrastive_weight=10"
    assert values == {
        "objective.contrastive_weight": {"0": "language", "1.0": "joint", "2": two, "2.0": two, "10": ten},
        "model.precision": {"fp32": "joint model.precision=fp32", "bf16": "joint"}
        if recipe.model.precision == "bf16"
        else {"fp32": "joint", "bf16": "joint model.precision=bf16"},
    }
    assert list(values["objective.contrastive_weight"]) == ["0", "1.0", "2", "2.0", "10"]
    assert set(recipes) == {arm for arms in values.values() for arm in arms.values()}
    assert recipes["language"].objective.contrastive_weight == 0 and recipes["joint"] == recipe


def test_every_value_has_a_directory_of_its_own(tmp_path):
    values = ["a", "A/b", "A b", "A%2Fb", "..", "../../x", "é", "[1,2]", "x" * 500, "x" * 499 + "y", "\\", "*"]
    names = [directory_name(f"joint data.sources={value}", seed) for value in values for seed in (1, 11)]
    assert len(set(names)) == len(names)
    for name in names:
        (tmp_path / name).mkdir()
        assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    assert directory_name("contrastive", 2) == "contrastive-2"
    assert directory_name("joint objective.temperature=0.1", 0) == "joint-objective.temperature=0.1-0"


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
