"""Contrastive-only, language-only and joint from the same base, the same steps, over several seeds."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cafe.checkpoint import resolve_checkpoint
from cafe.errors import CafeError
from cafe.evaluation.runner import measure, select_suites, training_evaluator
from cafe.model import Cafe
from cafe.training.loop import train
from cafe.training.recipe import Recipe

ARMS: dict[str, dict[str, Any]] = {
    "contrastive": {"lm_weight": 0.0},
    "language": {"contrastive_weight": 0.0},
    "joint": {},
}
SHOWN = (
    "retrieval/image_to_text/R@1",
    "retrieval/text_to_image/R@1",
    "paragraphs/image_to_text/R@1",
    "paragraphs/text_to_image/R@1",
    "mmeb/overall/mean",
    "sugarcrepe/mean/embedding",
    "sugarcrepe/mean/likelihood",
    "aro/relation/embedding",
    "aro/relation/likelihood",
    "aro/attribution/embedding",
    "aro/attribution/likelihood",
    "winoground/embedding/group",
    "winoground/likelihood/group",
    "captions/exact",
    "objects/hallucinated",
    "chair/CHAIR_i",
    "throne/overall/F1",
    "vqa/all",
    "vqav2/scenes/all",
    "pope/mean/accuracy",
    "pope/adversarial/accuracy",
    "geometry/modality_gap",
)


def ablate(recipe: Recipe, seeds: int, suites: Sequence[str] = ()) -> str:
    """Trains and measures every arm for every seed, prints the table and writes it to `ablation.json`; returns it.

    What was trained or measured before is not done again.

    Raises:
        CafeError: the recipe names no evaluation data.
    """
    if not recipe.evaluation.data:
        raise CafeError("An ablation needs evaluation.data in its recipe.")
    data, output = Path(recipe.evaluation.data), Path(recipe.output)
    select_suites(data, suites)  # before a model is loaded
    base = Cafe.load(resolve_checkpoint(recipe.model.base))
    measured = {"base": [measure(base, data, output / "base", suites)]}
    for arm, weights in ARMS.items():
        for seed in range(seeds):
            place = output / f"{arm}-{seed}"
            run = replace(recipe, output=str(place), seed=seed, objective=replace(recipe.objective, **weights))
            trained = Cafe.load(train(run, training_evaluator(run)))
            measured.setdefault(arm, []).append(measure(trained, data, place, suites))
    table = _table(measured)
    (output / "ablation.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(table)
    return table


def _table(measured: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| | " + " | ".join(measured) + " |", "|---|" + "---|" * len(measured)]
    for metric in (name for name in SHOWN if any(name in run for runs in measured.values() for run in runs)):
        cells = [_cell([run[metric] for run in runs if metric in run]) for runs in measured.values()]
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"
