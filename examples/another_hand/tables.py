"""Put the arms side by side in Markdown tables, with floors, chance and intervals, and judge them by what must hold.

Results are read from `OUTPUT/base` and `OUTPUT/ARM-SEED`, as `cafe ablate` names them, in `measured/FOLDER` of each, as
`measure.py` writes them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import ge
from pathlib import Path
from typing import Any

import numpy as np

from another_hand.headlines import HEADLINES, VARIED, Headline
from another_hand.intervals import Difference, Statistic, auc, difference, gap, mean, rate
from cafe.errors import CafeError
from cafe.evaluation.stored import read_embeddings, read_json_lines, read_means, read_results

ARMS = ("base", "contrastive", "language", "joint")
JUDGED = ("new-scenes", "openmoji")  # the folders on which something must hold
COMPARED = ("language", "contrastive", "base")  # with the joint arm


@dataclass(frozen=True)
class Run:
    """Read the results of one run on one folder of evaluation files."""

    directory: Path

    @cached_property
    def results(self) -> dict[str, float]:
        """The results by name."""
        return read_results(self.directory / "results.json")

    @cached_property
    def means(self) -> dict[str, list[str]]:
        """The results that are means of others."""
        return read_means(self.directory / "means.json")

    @cached_property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """The output rows of each file."""
        return {path.stem: read_json_lines(path) for path in sorted((self.directory / "outputs").glob("*.jsonl"))}

    @property
    def gap_by_chance(self) -> float:
        """The modality gap if what parts each image from its text had a random sign: that of so many pairs alone."""
        arrays = read_embeddings(self.directory / "embeddings.npz")
        apart = arrays["images"][arrays["owner"]] - arrays["texts"]
        return float(np.sqrt(np.square(apart).sum(axis=1).mean() / len(apart)))

    def statistic(self, name: str) -> Statistic:
        """Make a result that can be resampled.

        Raises:
            CafeError: the run's outputs do not give the result.
        """
        if name in self.means:
            return mean([self.statistic(part) for part in self.means[name]])
        if name == "geometry/modality_gap":
            arrays = read_embeddings(self.directory / "embeddings.npz")
            return gap(arrays["images"], arrays["texts"], arrays["owner"])
        if name.endswith("/auc"):
            return auc(self.rows[name.removesuffix("/auc").replace("/", "_")])
        for rows in self.rows.values():
            if any(name in row["marks"] for row in rows):
                return rate(rows, name)
        raise CafeError(f"The outputs in {self.directory} have no marks for {name}.")


Runs = Mapping[str, Sequence[Run]]  # by arm, of each seed


def collect(output: Path, folder: str) -> dict[str, list[Run]]:
    """Find the runs of each arm that were measured on a folder of evaluation files, in the order of the seeds."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in output.glob(f"*/measured/{folder}/results.json"):
        arm, _, seed = path.parents[2].name.rpartition("-")
        if path.parents[2].name == "base":
            arm, seed = "base", "0"
        if arm and seed.isdecimal():
            found.setdefault(arm, []).append((int(seed), path.parent))
    arms = sorted(found, key=lambda arm: (ARMS.index(arm) if arm in ARMS else len(ARMS), arm))
    return {arm: [Run(path) for _, path in sorted(found[arm])] for arm in arms}


def average(runs: Sequence[Run], name: str) -> float:
    """Average a result over the seeds; NaN where one lacks it or there is none."""
    return float(np.mean([run.results.get(name, np.nan) for run in runs])) if runs else np.nan


def compare(runs: Runs, first: str, second: str, name: str) -> Difference | None:
    """Compute `first` minus `second` with its interval; None where an arm lacks the result."""
    both = [*runs.get(first, ()), *runs.get(second, ())]
    if first not in runs or second not in runs or any(name not in run.results for run in both):
        return None
    of_first, of_second = ([run.statistic(name) for run in runs[arm]] for arm in (first, second))
    return difference(of_first, of_second)


def format_folder(
    runs: Runs, floors: Mapping[str, Mapping[str, float]], headlines: Sequence[Headline] = HEADLINES
) -> str:
    """Format the table of one folder: a row per result, a column per arm, and the joint arm minus each other one.

    Args:
        runs: the runs by arm.
        floors: "floor" and "chance", each by result.
        headlines: the rows, of which those that no run has are left out.
    """
    compared = [arm for arm in COMPARED if "joint" in runs and arm in runs]
    titles = ["", "chance", "floor", *runs, *(f"joint − {arm} (95%)" for arm in compared)]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for headline in headlines:
        values = [average(each, headline.name) for each in runs.values()]
        if np.isnan(values).all():
            continue
        references = [floors.get(kind, {}).get(headline.name, np.nan) for kind in ("chance", "floor")]
        cells = [_number(value, headline) for value in [*references, *values]]
        cells += [_difference(compare(runs, "joint", arm, headline.name), headline) for arm in compared]
        better = " ↓" if headline.less else ""
        lines.append(f"| {headline.label}{better} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_variants(runs: Runs) -> str:
    """Format a table of the joint arm and its variants, a row each, with their differences from language alone."""
    columns = [headline for headline in HEADLINES if headline.name in VARIED]
    titles = ["", "seeds"]
    for headline in columns:
        titles.append(headline.label + (" ↓" if headline.less else ""))
        titles.append("− language (95%)")
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for arm in ("language", *(arm for arm in runs if arm.startswith("joint"))):
        cells = [str(len(runs.get(arm, ())))]
        for headline in columns:
            cells.append(_number(average(runs.get(arm, ()), headline.name), headline))
            found = None if arm == "language" else compare(runs, arm, "language", headline.name)
            cells.append(_difference(found, headline))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float, headline: Headline) -> str:
    """Format a result; one that is missing as a dash."""
    if np.isnan(value):
        return "–"
    return f"{value:.1f}" if headline.percent else f"{value:.3f}"


def _difference(found: Difference | None, headline: Headline) -> str:
    """Format a difference with its interval, in bold if that does not contain 0."""
    if found is None:
        return "–"
    digits = 1 if headline.percent else 3
    rounded = (round(number, digits) + 0.0 for number in (found.value, found.low, found.high))  # no −0
    value, low, high = (f"{number:+.{digits}f}".replace("-", "−") for number in rounded)
    text = f"{value} [{low}, {high}]"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


@dataclass(frozen=True)
class Must:
    """Hold one thing that must hold: what it says, what was measured, and whether it is so; None if unmeasured."""

    claim: str
    measured: str
    holds: bool | None


def musts(runs: Runs) -> Iterator[Must]:
    """Judge the runs on one folder by what the joint arm must reach."""
    by_name = {headline.name: headline for headline in HEADLINES}
    limits = {
        "retrieval/image_to_text/R@1": ("contrastive", 3),
        "retrieval/text_to_image/R@1": ("contrastive", 3),
        "vqa/name": ("language", 2),
        "objects/recall": ("language", 2),
        "objects/hallucinated": ("language", 2),
    }
    for name, (arm, points) in limits.items():
        headline = by_name[name]
        found = compare(runs, "joint", arm, name)
        worse = None if found is None else (found.value if headline.less else -found.value)
        claim = f"{headline.label}: joint within {points} points of {arm} alone"
        yield _must(claim, worse, partial(ge, points), _difference(found, headline))
    if "contrastive" in runs:
        exact = average(runs["contrastive"], "captions/exact")
        yield _must("contrastive alone cannot speak: under 1% of descriptions right", exact, lambda value: value < 1)
    if "joint" in runs and "base" in runs:
        joint, base = (average(runs[arm], "geometry/modality_gap") for arm in ("joint", "base"))
        chance = float(np.mean([run.gap_by_chance for run in runs["joint"]]))
        claim = "modality gap: joint under a fifth of the base's"
        shown = f"{joint:.3f} of {base:.3f}; {chance:.3f} by chance"
        yield _must(claim, joint / base, lambda share: share < 0.2, shown)


def _must(claim: str, value: float | None, holds: Callable[[float], bool], shown: str | None = None) -> Must:
    """Judge a value, which may be missing."""
    if value is None or np.isnan(value):
        return Must(claim, "–", None)
    return Must(claim, shown or f"{value:.1f}", holds(value))


def format_musts(judged: Mapping[str, Sequence[Must]]) -> str:
    """Format what must hold on each folder, by the folder's name."""
    lines = ["| on | must | measured | |", "|---|---|---:|---|"]
    words = {True: "met", False: "**missed**", None: "not measured"}
    for folder, found in judged.items():
        lines += [f"| {folder} | {must.claim} | {must.measured} | {words[must.holds]} |" for must in found]
    return "\n".join(lines)


def write_tables(
    output: Path, floors: Mapping[str, Mapping[str, Mapping[str, float]]], judged: Sequence[str] = JUDGED
) -> str:
    """Format all tables of an ablation's directory.

    Args:
        output: the directory.
        floors: by folder, as `measure_all_floors` gives them.
        judged: the folders on which something must hold.

    Raises:
        CafeError: nothing was measured.
    """
    folders = sorted({path.parent.name for path in output.glob("*/measured/*/results.json")})
    if not folders:
        raise CafeError(f"There are no results in {output}: run another_hand.measure first.")
    parts = []
    for folder in folders:
        runs = collect(output, folder)
        arms = {arm: each for arm, each in runs.items() if arm in ARMS}
        seeds = ", ".join(f"{arm} {len(each)}" for arm, each in arms.items())
        parts.append(f"## {folder}\n\nRuns: {seeds}.\n\n{format_folder(arms, floors.get(folder, {}))}")
        if runs.keys() - arms.keys():
            parts.append(f"### Variants on {folder}\n\n{format_variants(runs)}")
    found = {folder: list(musts(collect(output, folder))) for folder in judged if folder in folders}
    return "\n\n".join([*parts, "## What must hold", format_musts(found)]) + "\n"


def format_photographs(measured: Path) -> str:
    """Format how each model finds photographs by their sentences and back: a row per model, a directory of results."""
    columns = [f"retrieval/{way}/R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    titles = [name.removeprefix("retrieval/").replace("_", " ").replace("/", ", ") for name in columns]
    lines = ["| | " + " | ".join([*titles, "modality gap"]) + " |", "|---|" + "---:|" * (len(titles) + 1)]
    for path in sorted(measured.glob("*/results.json")):
        results = read_results(path)
        cells = [f"{results[name]:.1f}" for name in columns]
        lines.append(f"| {path.parent.name} | " + " | ".join(cells) + f" | {results['geometry/modality_gap']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Write the tables of an ablation as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m another_hand.tables", description=main.__doc__)
    parser.add_argument("output", type=Path, help="the ablation's directory, in which every run was measured")
    parser.add_argument("floors", type=Path, help="what another_hand.floors wrote")
    parser.add_argument("target", type=Path, help="the file to write")
    options = parser.parse_args()
    try:
        text = write_tables(options.output, json.loads(options.floors.read_text(encoding="utf-8")))
    except CafeError as error:
        sys.exit(str(error))
    options.target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
