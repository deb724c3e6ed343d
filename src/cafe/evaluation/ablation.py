"""Compare contrastive, language and joint training: the same base and the same steps, over several seeds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from cafe.checkpoint import resolve_checkpoint
from cafe.errors import RecipeError
from cafe.evaluation.runner import dump_json, measure, select_suites, training_evaluator
from cafe.evaluation.suite import Suite, headline_results
from cafe.evaluation.suites import SUITES
from cafe.model import Cafe
from cafe.training.loop import train
from cafe.training.recipe import Recipe
from cafe.utils.atomic import atomic_write_text
from cafe.utils.text import escape_controls

# Each arm is the recipe with these weights of its losses.
ARMS: dict[str, dict[str, Any]] = {
    "contrastive": {"lm_weight": 0.0},
    "language": {"contrastive_weight": 0.0},
    "joint": {},
}

Results = dict[str, float]


def ablate(recipe: Recipe, seeds: int, suites: Sequence[str] = ()) -> str:
    """Train and measure every arm with every seed, print the table and write the results to `ablation.json`.

    What was trained or measured before is reused.

    Returns:
        the table of the suites' headline results.

    Raises:
        RecipeError: the recipe names no evaluation data.
    """
    if not recipe.evaluation.data:
        raise RecipeError("An ablation needs evaluation.data in its recipe.")
    data, output = Path(recipe.evaluation.data), Path(recipe.output)
    select_suites(data, suites)  # reports a mistake before a model is loaded
    base = Cafe.load(resolve_checkpoint(recipe.model.base))
    measured = {"base": [measure(base, data, output / "base", suites)]}
    for arm, weights in ARMS.items():
        objective = replace(recipe.objective, **weights)
        runs = []
        for seed in range(seeds):
            directory = output / f"{arm}-{seed}"
            run = replace(recipe, output=str(directory), seed=seed, objective=objective)
            # A finished run is not trained again, and an interrupted one resumes.
            trained = Cafe.load(train(run, training_evaluator(run)))
            runs.append(measure(trained, data, directory, suites))
        measured[arm] = runs
    table = format_table(measured)
    atomic_write_text(output / "ablation.json", dump_json(measured, indent=2) + "\n")
    print(escape_controls(table, keep="\n"))
    return table


def format_table(measured: Mapping[str, Sequence[Results]], suites: Sequence[Suite] = SUITES) -> str:
    """Format a Markdown table of the headline results: a row per result, a column per arm.

    Args:
        measured: by arm, the results of each seed.
        suites: the suites that declare which results are headlines.
    """
    lines = ["| | " + " | ".join(measured) + " |", "|---|" + "---|" * len(measured)]
    # A suite may have results in some arms alone: the names are those of all runs, each once.
    all_runs = chain.from_iterable(measured.values())
    names = list(dict.fromkeys(chain.from_iterable(all_runs)))
    for name in headline_results(suites, names):
        cells = [_format_cell(name, runs) for runs in measured.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _format_cell(name: str, runs: Sequence[Results]) -> str:
    """Format a result's mean over the seeds and, with several of them, the standard deviation."""
    values = [run[name] for run in runs if name in run]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.2f}"
