"""Write one self-contained HTML page that compares evaluations: no script, no network, images and charts inside."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cafe.content import ImageRef
from cafe.errors import CafeError
from cafe.evaluation.report.charts import (
    RUN_COLORS,
    embedding_maps,
    interval_chart,
    similarity_histograms,
    training_charts,
)
from cafe.evaluation.report.run import LoadedRun, ReportRun, load_run
from cafe.evaluation.report.significance import Comparison, compare
from cafe.evaluation.report.trade_off import Ablation, mean_and_deviation
from cafe.evaluation.report.trade_off_chart import trade_off_chart
from cafe.evaluation.suite import Suite, direction_of, headline_results, is_percent, label_of
from cafe.evaluation.suites import SUITES
from cafe.images.decoding import decode_image
from cafe.images.thumbnails import thumbnail
from cafe.utils.paths import is_within

__all__ = ["ReportRun", "write_report"]

_THUMBNAIL = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]*")


@dataclass(frozen=True)
class Metric:
    """Hold how a result is shown.

    Attributes:
        suite: the first word of the result's name.
        name: the rest, as words.
        direction: 1 if more is better, -1 if less is, 0 if neither is.
        in_percent: whether it is a rate in percent.
    """

    suite: str
    name: str
    direction: int
    in_percent: bool

    def format(self, value: float | None) -> str:
        """Format a value, with a dash for one that is missing."""
        if value is None:
            return "–"
        decimals = 1 if self.in_percent else 3
        return f"{value:.{decimals}f}".replace("-", "−")

    def judge(self, change: float, comparison: Comparison | None) -> str:
        """Judge a change as "good" or "bad"; "same" where neither is better or the change's interval includes zero."""
        if comparison is not None and comparison.low <= 0 <= comparison.high:
            return "same"
        improvement = change * self.direction
        if improvement > 0:
            return "good"
        if improvement < 0:
            return "bad"
        return "same"


Metrics = Mapping[str, Metric]


def write_report(
    path: Path, runs: Sequence[ReportRun], suites: Sequence[Suite] = SUITES, ablation: Ablation | None = None
) -> None:
    """Write the page. The first run is "before", the last one "after"; samples are shown of these two.

    Args:
        path: the HTML file.
        runs: the evaluations to compare.
        suites: the suites that declare which results are headlines and in which direction they improve.
        ablation: the results of all arms and seeds, which have a section of their own if given.

    Raises:
        CafeError: there is no run, or a file or an image of a run is missing or damaged.
    """
    if not runs:
        raise CafeError("A report needs at least one evaluation.")
    loaded = [load_run(run) for run in runs]
    # Every run is compared with the first; tiles and samples have room for two.
    first, last = loaded[0], loaded[-1]
    shown = [first, last] if len(loaded) > 1 else loaded
    compared = [_compare_runs(first, run) for run in loaded[1:]]

    # Results keep the order in which the suites wrote them, those of later runs at the end.
    names = list(dict.fromkeys(chain.from_iterable(run.results for run in loaded)))
    metrics = {name: _describe(name, suites) for name in names}
    headlines = {name: label_of(suites, name) or _as_words(name) for name in headline_results(suites, names)}

    # Names of runs, texts and answers were written by others: the template escapes all but the charts and images.
    template = files("cafe.evaluation.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = page.from_string(template).render(
        names=[run.name for run in loaded],
        shown=[run.name for run in shown],
        tiles=_tiles(shown, headlines, metrics, compared[-1] if compared else {}),
        tables=_tables(loaded, metrics, suites),
        arms=_arms_table(ablation, suites) if ablation else None,
        trade_off=trade_off_chart(ablation, suites) if ablation else None,
        intervals=interval_chart(loaded, headlines),
        comparisons=[
            _comparison_table(first, run, comparisons, metrics)
            for run, comparisons in zip(loaded[1:], compared, strict=True)
        ],
        colors=RUN_COLORS,
        curves=training_charts(loaded),
        maps=embedding_maps(loaded),
        histograms=similarity_histograms(loaded),
        text_queries=_align_samples(shown, "text_queries", ("text",)),
        image_queries=_align_samples(shown, "image_queries", ("image",)),
        captions=_align_samples(shown, "captions", ("image",)),
        answers=_align_samples(shown, "answers", ("image", "asked")),
        # An image may be shown many times.
        image=cache(partial(_image_tag, folder=last.samples.get("data", ""))),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Half of a surrogate pair, as a text may hold, cannot be written.
    path.write_text(html, encoding="utf-8", errors="backslashreplace")


def _describe(name: str, suites: Sequence[Suite]) -> Metric:
    """Collect how the suites want a result to be shown."""
    suite, _, rest = name.partition("/")
    return Metric(suite, _as_words(rest), direction_of(suites, name), is_percent(suites, name))


def _as_words(name: str) -> str:
    """Write a result's name as words: "pope/yes_ratio" becomes "pope · yes ratio"."""
    return name.replace("_", " ").replace("/", " · ")


def _compare_runs(first: LoadedRun, second: LoadedRun) -> dict[str, Comparison]:
    """Compare each result for which both runs have outputs of the same samples."""
    comparisons = {}
    common = first.tallies.keys() & second.tallies.keys()
    for name in second.results:
        if name not in common:
            continue
        comparison = compare(first.tallies[name], second.tallies[name])
        # Evaluations of other data, or with another limit, have no samples to pair.
        if comparison is not None:
            comparisons[name] = comparison
    return comparisons


def _tiles(
    runs: Sequence[LoadedRun], headlines: Mapping[str, str], metrics: Metrics, comparisons: Mapping[str, Comparison]
) -> list[dict[str, str]]:
    """Make a tile per headline result that the last run has, with its change from the first run.

    Args:
        runs: the first run and the last one, or a single run.
        headlines: by result, what to call it.
        metrics: how results are shown.
        comparisons: of the two runs, for results whose samples can be paired.
    """
    tiles = []
    for name, label in headlines.items():
        metric = metrics[name]
        before, after = runs[0].results.get(name), runs[-1].results.get(name)
        if after is None:
            continue
        unit = "%" if metric.in_percent else ""
        tile = {"label": label, "unit": unit, "after": metric.format(after)}
        # A single run is first and last: it has no change.
        if len(runs) > 1 and before is not None:
            change = after - before
            tile["before"] = metric.format(before)
            tile["change"] = ("+" if change >= 0 else "−") + metric.format(abs(change))
            tile["verdict"] = metric.judge(change, comparisons.get(name))
        tiles.append(tile)
    return tiles


def _arms_table(ablation: Ablation, suites: Sequence[Suite]) -> dict[str, Any]:
    """Make the table of an ablation, with a row per arm and a column per headline result."""
    names = headline_results(suites, ablation.names)
    metrics = [_describe(name, suites) for name in names]
    rows = []
    for arm, runs in ablation.measured.items():
        cells = []
        for name, metric in zip(names, metrics, strict=True):
            values = [run[name] for run in runs if name in run]
            mean, deviation = map(metric.format, mean_and_deviation(values) if values else (None, None))
            cells.append({"mean": mean, "deviation": deviation if len(values) > 1 else ""})
        rows.append({"arm": arm, "cells": cells})
    columns = [
        {"label": label_of(suites, name) or _as_words(name), "direction": metric.direction}
        for name, metric in zip(names, metrics, strict=True)
    ]
    seeds = max(len(runs) for runs in ablation.measured.values())
    return {"columns": columns, "rows": rows, "seeds": seeds, "swept": bool(ablation.swept)}


def _tables(runs: Sequence[LoadedRun], metrics: Metrics, suites: Sequence[Suite]) -> list[dict[str, Any]]:
    """Make a table per suite, with a row per result and a cell per run."""
    # The results of a suite need not follow one another: those of a later run come at the end.
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, metric in metrics.items():
        row = {"name": metric.name, "direction": metric.direction, "cells": _cells(runs, name, metric)}
        tables.setdefault(metric.suite, []).append(row)
    return [{"suite": label_of(suites, suite) or suite, "rows": rows} for suite, rows in tables.items()]


def _cells(runs: Sequence[LoadedRun], name: str, metric: Metric) -> list[dict[str, Any]]:
    """Make the cells of a result's row, one for each run; a run without the result has a dash."""
    values = [run.results.get(name) for run in runs]
    best = _best([value for value in values if value is not None], metric.direction)
    cells = []
    for run, value in zip(runs, values, strict=True):
        # A result without outputs has no interval.
        ends = map(metric.format, run.intervals.get(name, ()))
        is_best = best is not None and value == best
        cells.append({"value": metric.format(value), "best": is_best, "interval": "–".join(ends)})
    return cells


def _best(values: Sequence[float], direction: int) -> float | None:
    """Return the best of some values; None if they are equal or none is better."""
    if len(set(values)) < 2 or direction == 0:
        return None
    # The best is the one that is largest in the direction of improvement.
    return max(values, key=lambda value: direction * value)


def _comparison_table(
    first: LoadedRun, second: LoadedRun, comparisons: Mapping[str, Comparison], metrics: Metrics
) -> dict[str, Any]:
    """Make the table of the differences between two runs."""
    rows = []
    for name, comparison in comparisons.items():
        metric = metrics[name]
        # Differences are in percentage points, whatever the metric's own format.
        rows.append(
            {
                "suite": metric.suite,
                "name": metric.name,
                "first": metric.format(first.results[name]),
                "second": metric.format(second.results[name]),
                "difference": _signed(comparison.difference),
                "interval": f"{_signed(comparison.low)} to {_signed(comparison.high)}",
                "permutation": _p_value(comparison.permutation),
                "mcnemar": "" if comparison.mcnemar is None else _p_value(comparison.mcnemar),
                "verdict": metric.judge(comparison.difference, comparison),
            }
        )
    return {"first": first.name, "second": second.name, "rows": rows}


def _signed(value: float) -> str:
    """Format a difference with its sign, a plus too."""
    # The sign is that of the unrounded value: a small loss is shown as −0.0.
    sign = "−" if value < 0 else "+"
    return f"{sign}{abs(value):.1f}"


def _p_value(value: float) -> str:
    """Format a p-value; three decimals would show a very small one as 0."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _align_samples(runs: Sequence[LoadedRun], kind: str, key: tuple[str, ...]) -> list[list[dict[str, Any] | None]]:
    """List the samples of a kind that the last run has, each beside the same sample of the other runs.

    Args:
        runs: the runs to show.
        kind: a key of `samples.json`.
        key: the fields by which a sample is the same in two runs.
    """
    identify = itemgetter(*key)
    # Each run's samples by the value, or the tuple of values, under the key.
    by_key = []
    for run in runs:
        rows = run.samples.get(kind, [])
        by_key.append({identify(row): row for row in rows})
    # A run that was evaluated with a smaller limit lacks some samples, which stay empty on the page.
    return [[rows.get(sample) for rows in by_key] for sample in by_key[-1]]


def _image_tag(path: str, folder: str) -> Markup:
    """Make an `<img>` that contains an image of the evaluation's data; of another file, its name alone.

    Args:
        path: the image's, or a thumbnail as a data URI.
        folder: the folder of evaluation files, where the path begins; empty if it is not known.
    """
    if _THUMBNAIL.fullmatch(path):
        name, uri = "", path
    elif folder and is_within(Path(folder) / path, folder):
        name, uri = path, thumbnail(decode_image(ImageRef(Path(folder) / path)))
    else:
        # A page is passed on: it should show no file that its maker did not mean to show.
        return Markup('<img alt="{} is not shown: it is not in the folder of evaluation files">').format(path[:200])
    # Thumbnails of tiny images are PNG; the page enlarges them without smoothing.
    style = "pixels" if uri.startswith("data:image/png") else ""
    return Markup('<img alt="{}" class="{}" src="{}">').format(name, style, uri)
