"""Compare contrastive, language and joint training: the same base and the same steps, over several seeds."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cafe.checkpoint import resolve_checkpoint
from cafe.errors import RecipeError
from cafe.evaluation.report.page import write_report
from cafe.evaluation.report.run import ReportRun
from cafe.evaluation.report.trade_off import Ablation, Results, mean_and_deviation
from cafe.evaluation.report.trade_off_chart import standalone_svg, trade_off_chart
from cafe.evaluation.runner import dump_json, measure, select_suites, training_evaluator
from cafe.evaluation.suite import Suite, headline_results
from cafe.evaluation.suites import SUITES
from cafe.model import Cafe
from cafe.training.loop import train
from cafe.training.recipe import Recipe
from cafe.training.recipe_io import Sweep
from cafe.utils.atomic import atomic_write_text
from cafe.utils.text import escape_controls

# Each arm is the recipe with these weights of its losses.
ARMS: dict[str, dict[str, Any]] = {
    "contrastive": {"lm_weight": 0.0},
    "language": {"contrastive_weight": 0.0},
    "joint": {},
}
# Sections of a recipe that are the same in all runs of an ablation, or that it sets itself.
NOT_SWEPT = ("output", "seed", "evaluation")
MAX_DIRECTORY_NAME = 100  # characters, of the 255 bytes that a file system allows


def ablate(
    recipe: Recipe,
    seeds: int,
    suites: Sequence[str] = (),
    sweeps: Sequence[Sweep] = (),
    arms: Sequence[str] = tuple(ARMS),
    sweep_seeds: int | None = None,
) -> str:
    """Train and measure every arm with every seed, print the table and write the results into the recipe's output.

    `ablation.json` has the results, `report.html` compares them and `front.svg` is its chart of retrieval against
    generation. What was trained or measured before is reused.

    Args:
        recipe: the joint run.
        seeds: the number of runs of each arm.
        suites: names of suites, as in `evaluate`.
        sweeps: the joint run with other values of a field, which are arms too.
        arms: which of `ARMS` to train.
        sweep_seeds: the number of runs of each value of a sweep; as many as of each arm if None.

    Returns:
        the table of the suites' headline results.

    Raises:
        RecipeError: the recipe names no evaluation data, an arm is unknown, or a field cannot be swept.
    """
    if not recipe.evaluation.data:
        raise RecipeError("An ablation needs evaluation.data in its recipe.")
    data, output = Path(recipe.evaluation.data), Path(recipe.output)
    sweep_seeds = seeds if sweep_seeds is None else sweep_seeds
    # Mistakes are reported before a model is loaded.
    select_suites(data, suites)
    recipes, values = arm_recipes(recipe, sweeps, arms)
    evaluators = {arm: training_evaluator(arm_recipe) for arm, arm_recipe in recipes.items()}

    base = Cafe.load(resolve_checkpoint(recipe.model.base))
    measured = {"base": [measure(base, data, output / "base", suites)]}
    for arm, arm_recipe in recipes.items():
        measured[arm] = []
        for seed in range(seeds if arm in ARMS else sweep_seeds):
            directory = output / directory_name(arm, seed)
            run = replace(arm_recipe, output=str(directory), seed=seed)
            # A finished run is not trained again, and an interrupted one resumes.
            trained = Cafe.load(train(run, evaluators[arm]))
            measured[arm].append(measure(trained, data, directory, suites))

    table = format_table(measured)
    atomic_write_text(output / "ablation.json", dump_json(measured, indent=2) + "\n")
    print(escape_controls(table, keep="\n"))
    write_ablation_report(output, Ablation(measured, values))
    return table


def arm_recipes(
    recipe: Recipe, sweeps: Sequence[Sweep], names: Sequence[str]
) -> tuple[dict[str, Recipe], dict[str, dict[str, str]]]:
    """Make the recipe of each arm.

    Args:
        recipe: the joint run.
        sweeps: the joint run with other values of a field.
        names: which of `ARMS` to make.

    Returns:
        the recipes by arm, and by swept field the arm of each value, in order. A value that makes the recipe of
        another arm, such as the joint one, is that arm.

    Raises:
        RecipeError: an arm is unknown, or a field cannot be swept.
    """
    for name in names:
        if name not in ARMS:
            raise RecipeError(f"There is no arm {name!r}; the arms are {', '.join(ARMS)}.")
    recipes = {arm: replace(recipe, objective=replace(recipe.objective, **ARMS[arm])) for arm in ARMS}
    values: dict[str, dict[str, str]] = {}
    for sweep in sweeps:
        if sweep.field.split(".")[0] in NOT_SWEPT:
            raise RecipeError(f"The ablation itself sets {sweep.field}, or needs it to be the same in all arms.")
        for value, swept in sweep.recipes.items():
            # A value that makes the recipe of a known arm is not trained again.
            arm = next((arm for arm, known in recipes.items() if known == swept), f"joint {sweep.field}={value}")
            recipes.setdefault(arm, swept)
            values.setdefault(sweep.field, {})[value] = arm
    values = {field: {value: arms[value] for value in _in_order(arms)} for field, arms in values.items()}
    # An arm that was not asked for is made if a sweep contains it.
    wanted = {*names}.union(*(arms.values() for arms in values.values()))
    return {arm: recipes[arm] for arm in recipes if arm in wanted}, values


def _in_order(values: Iterable[str]) -> list[str]:
    """Sort values as numbers; leave them in their order if one is none."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return list(values)


def directory_name(arm: str, seed: int) -> str:
    """Name the directory of a run, whatever the value is that its arm's name contains."""
    # Readable where it can be, and unique where it is cut.
    name = quote(arm.replace(" ", "-", 1), safe="=,")  # a value may contain a slash
    if len(name) > MAX_DIRECTORY_NAME:
        digest = hashlib.sha256(arm.encode()).hexdigest()[:16]
        name = f"{name[:MAX_DIRECTORY_NAME]}-{digest}"
    return f"{name}-{seed}"


def write_ablation_report(output: Path, ablation: Ablation, suites: Sequence[Suite] = SUITES) -> None:
    """Write `report.html`, and `front.svg` if two arms have results of both kinds, into the ablation's directory."""
    runs = [ReportRun("base", output / "base")]
    for arm in ARMS:
        if arm in ablation.measured:
            directory = output / directory_name(arm, 0)
            runs.append(ReportRun(arm, directory, directory / "log.jsonl"))
    write_report(output / "report.html", runs, suites, ablation)
    chart = trade_off_chart(ablation, suites)
    if chart is not None:
        atomic_write_text(output / "front.svg", standalone_svg(chart))


def format_table(measured: Mapping[str, Sequence[Results]], suites: Sequence[Suite] = SUITES) -> str:
    """Format a Markdown table of the headline results: a row per result, a column per arm.

    Args:
        measured: by arm, the results of each seed.
        suites: the suites that declare which results are headlines.
    """
    lines = ["| | " + " | ".join(measured) + " |", "|---|" + "---|" * len(measured)]
    for name in headline_results(suites, Ablation(measured).names):
        cells = [_format_cell(name, runs) for runs in measured.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _format_cell(name: str, runs: Sequence[Results]) -> str:
    """Format a result's mean over the seeds and, with several of them, the standard deviation."""
    values = [run[name] for run in runs if name in run]
    if not values:
        return "-"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.2f} ± {deviation:.2f}" if len(values) > 1 else f"{mean:.2f}"
