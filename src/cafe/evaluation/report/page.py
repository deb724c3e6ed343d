"""One self-contained HTML page that compares evaluations: no script, no network, pictures and charts inside."""

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jinja2
import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from cafe.content import ImageRef
from cafe.errors import CafeError
from cafe.evaluation.report.significance import Comparison, SampleTally, compare, interval, tallies
from cafe.images.decoding import decode_image
from cafe.images.thumbnails import thumbnail

HEADLINES = {
    "retrieval/text_to_image/R@1": "Text finds image, R@1",
    "retrieval/image_to_text/R@1": "Image finds text, R@1",
    "flickr30k/text_to_image/R@1": "Flickr30K, text finds image, R@1",
    "flickr30k/image_to_text/R@1": "Flickr30K, image finds text, R@1",
    "coco/text_to_image/R@1": "COCO, text finds image, R@1",
    "coco/image_to_text/R@1": "COCO, image finds text, R@1",
    "paragraphs/text_to_image/R@1": "Paragraph finds image, R@1",
    "mmeb/overall/mean": "MMEB, mean over datasets",
    "sugarcrepe/mean/embedding": "SugarCrepe, by embedding",
    "sugarcrepe/mean/likelihood": "SugarCrepe, by likelihood",
    "captions/exact": "Captions exactly right",
    "vqa/all": "Questions answered",
    "pope/adversarial/accuracy": "POPE, adversarial",
    "objects/recall": "Objects mentioned",
    "objects/hallucinated": "Objects hallucinated",
    "chair/CHAIR_i": "CHAIR, mentions hallucinated",
    "throne/overall/F1": "THRONE, F1",
    "geometry/modality_gap": "Modality gap",
}
CURVES = {
    "loss": "Loss",
    "lm_loss": "Language-modelling loss",
    "contrastive_loss": "Contrastive loss",
    "accuracy": "Pairs found in the batch",
    "grad_norm_lm": "Gradient norm, language",
    "grad_norm_contrastive": "Gradient norm, contrast",
    "temperature": "Temperature",
    "lr": "Learning rate",
}
LOWER_IS_BETTER = (
    *("modality_gap", "separability", "alignment", "uniformity"),
    *("hallucinated", "neither", "median_rank", "mean_rank", "CHAIR_i", "CHAIR_s"),
)
NO_DIRECTION = (
    *("hubness_images", "hubness_texts", "matched_similarity", "mismatched_similarity"),
    *("yes_ratio", "mentions", "split", "datasets", "chance", "left_out"),
)
MAPPED = 300  # embeddings of each side on the map

IMAGE_COLOR, TEXT_COLOR, FADED_COLOR = "#2a78d6", "#eb6834", "#8a8f98"
RUN_COLORS = ("#2a78d6", "#eb6834", "#1baf7a", "#8a5cd6", "#d64a8a", "#a88a1c")
_INK = "#0a0b0c"  # stands for the page's own text color until the chart is laid into the page


@dataclass(frozen=True)
class ReportRun:
    """One evaluated checkpoint: its name, the directory `evaluate.write` filled, and its training's `log.jsonl`."""

    name: str
    directory: Path
    log: Path | None = None


@dataclass(frozen=True)
class _Run:
    """A run's files, read."""

    name: str
    results: dict[str, float]
    samples: dict[str, Any]
    embeddings: dict[str, np.ndarray]
    log: list[dict[str, float]]
    tallies: dict[str, list[SampleTally]]
    intervals: dict[str, tuple[float, float]]


def write_report(path: Path, runs: Sequence[ReportRun]) -> None:
    """Writes the page. The first run is "before", the last one "after"; samples are shown of these two.

    Raises:
        CafeError: there is no run, or a run's file or a picture is missing or damaged.
    """
    if not runs:
        raise CafeError("A report needs at least one evaluation.")
    read = [_read(run) for run in runs]
    shown = [read[0], read[-1]] if len(read) > 1 else read
    compared = [_compared(read[0], run) for run in read[1:]]
    template = files("cafe.evaluation.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    html = page.from_string(template).render(
        names=[run.name for run in read],
        shown=[run.name for run in shown],
        tiles=_tiles(shown, compared[-1] if compared else {}),
        tables=_tables(read),
        intervals=_intervals(read),
        comparisons=[_comparison(read[0], run, found) for run, found in zip(read[1:], compared, strict=True)],
        colors=RUN_COLORS,
        curves=_curves(read),
        maps=_maps(read),
        histograms=_histograms(read),
        text_queries=_align_samples(shown, "text_queries", ("text",)),
        image_queries=_align_samples(shown, "image_queries", ("image",)),
        captions=_align_samples(shown, "captions", ("image",)),
        answers=_align_samples(shown, "answers", ("image", "asked")),
        picture=_sample_image(read[-1].samples.get("data", ".")),
    )
    path.write_text(html, encoding="utf-8")


def _read(run: ReportRun) -> _Run:
    try:
        with np.load(run.directory / "embeddings.npz") as arrays:
            embeddings = dict(arrays)
        results = json.loads((run.directory / "results.json").read_text())
        samples = json.loads((run.directory / "samples.json").read_text())
        lines = run.log.read_text().splitlines() if run.log else []
        log = [json.loads(line) for line in lines]
        known = {
            metric: [tally]
            for path in sorted((run.directory / "outputs").glob("*.jsonl"))
            for metric, tally in tallies(map(json.loads, path.read_text().splitlines())).items()
        }
        means = run.directory / "means.json"
        for metric, parts in (json.loads(means.read_text()) if means.is_file() else {}).items():
            if all(part in known for part in parts):
                known[metric] = [tally for part in parts for tally in known[part]]
        sure = {metric: interval(tallied) for metric, tallied in known.items()}
        return _Run(run.name, results, samples, embeddings, log, known, sure)
    except FileNotFoundError as error:
        raise CafeError(f"The run {run.name!r} lacks the file {error.filename}.") from None
    except (ValueError, EOFError, BadZipFile) as error:  # the last two: embeddings.npz is cut short
        raise CafeError(f"A file of the run {run.name!r} in {run.directory} cannot be read: {error}.") from None


def _better(metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither."""
    last = metric.rsplit("/", 1)[-1]
    return 0 if last in NO_DIRECTION else -1 if last in LOWER_IS_BETTER else 1


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    digits = 3 if metric.startswith("geometry/") else 1
    return f"{value:.{digits}f}".replace("-", "−")


def _tiles(runs: Sequence[_Run], compared: Mapping[str, Comparison]) -> list[dict[str, str]]:
    tiles = []
    for metric, label in HEADLINES.items():
        values = [run.results.get(metric) for run in runs]
        before, after = values[0], values[-1]
        if after is None:
            continue
        tile = {"label": label, "unit": "" if metric.startswith("geometry/") else "%", "after": _number(metric, after)}
        if len(runs) > 1 and before is not None:
            change = after - before
            tile["before"] = _number(metric, before)
            tile["change"] = ("+" if change >= 0 else "−") + _number(metric, abs(change))
            tile["verdict"] = _verdict(metric, change, compared.get(metric))
        tiles.append(tile)
    return tiles


def _tables(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """One table a suite: a row a metric, a cell a run, the best marked."""
    metrics = list(dict.fromkeys(metric for run in runs for metric in run.results))
    tables: dict[str, list[dict[str, Any]]] = {}
    for metric in metrics:
        suite, _, name = metric.partition("/")
        values = [run.results.get(metric) for run in runs]
        known = [value for value in values if value is not None]
        best = {1: max(known), -1: min(known), 0: None}[_better(metric)] if len(set(known)) > 1 else None
        cells = [
            {
                "value": _number(metric, value),
                "best": best is not None and value == best,
                "interval": _range(metric, run.intervals.get(metric)),
            }
            for run, value in zip(runs, values, strict=True)
        ]
        tables.setdefault(suite, []).append({"name": _label(name), "direction": _better(metric), "cells": cells})
    return [{"suite": suite, "rows": rows} for suite, rows in tables.items()]


def _label(name: str) -> str:
    return name.replace("_", " ").replace("/", " · ")


def _range(metric: str, interval: tuple[float, float] | None) -> str:
    return "–".join(_number(metric, end) for end in interval) if interval else ""


def _intervals(runs: Sequence[_Run]) -> Markup | None:
    """The headline results of all runs as points with their intervals."""
    rows = [metric for metric in HEADLINES if any(metric in run.intervals for run in runs)]
    if not rows:
        return None
    apart = 0.6 / len(runs)

    def draw(axes: Axes) -> None:
        for number, run in enumerate(runs):
            color = RUN_COLORS[number % len(RUN_COLORS)]
            places = [place for place, metric in enumerate(rows) if metric in run.intervals]
            values = np.array([run.results[rows[place]] for place in places])
            ends = np.array([run.intervals[rows[place]] for place in places]).reshape(-1, 2)
            heights = np.array(places) + apart * (number - (len(runs) - 1) / 2)
            around = np.abs(ends.T - values)
            axes.errorbar(values, heights, xerr=around, fmt="o", color=color, markersize=4.5, label=run.name)
        axes.set(yticks=range(len(rows)), yticklabels=[HEADLINES[metric] for metric in rows], xlabel="percent")
        axes.invert_yaxis()
        axes.set_xlim(-2, 102)
        axes.grid(axis="x", alpha=0.15, color=_INK)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)

    return _chart("Headline results with intervals", 9.6, 0.7 + len(rows) * (0.2 + 0.16 * len(runs)), draw)


def _comparison(first: _Run, second: _Run, compared: Mapping[str, Comparison]) -> dict[str, Any]:
    """The differences between two runs, and how sure they are."""
    rows = []
    for metric, found in compared.items():
        suite, _, name = metric.partition("/")
        rows.append(
            {
                "suite": suite,
                "name": _label(name),
                "first": _number(metric, first.results[metric]),
                "second": _number(metric, second.results[metric]),
                "difference": _signed(found.difference),
                "interval": f"{_signed(found.low)} to {_signed(found.high)}",
                "permutation": _p(found.permutation),
                "mcnemar": "" if found.mcnemar is None else _p(found.mcnemar),
                "verdict": _verdict(metric, found.difference, found),
            }
        )
    return {"first": first.name, "second": second.name, "rows": rows}


def _compared(first: _Run, second: _Run) -> dict[str, Comparison]:
    """What separates the runs in each result for which both have outputs of the same samples."""
    known = (metric for metric in second.results if metric in first.tallies and metric in second.tallies)
    found = ((metric, compare(first.tallies[metric], second.tallies[metric])) for metric in known)
    return {metric: comparison for metric, comparison in found if comparison is not None}


def _verdict(metric: str, change: float, found: Comparison | None) -> str:
    """Whether a change is for the better; "same" where it is neither, or where its interval does not leave out zero."""
    unsure = found is not None and found.low <= 0 <= found.high
    if unsure or not change * _better(metric):
        return "same"
    return "good" if change * _better(metric) > 0 else "bad"


def _signed(value: float) -> str:
    return ("−" if value < 0 else "+") + f"{abs(value):.1f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _align_samples(runs: Sequence[_Run], kind: str, key: tuple[str, ...]) -> list[list[dict[str, Any] | None]]:
    """The samples of a kind that the last run has, each beside the same sample of the other runs."""
    by_key = [{tuple(row[k] for k in key): row for row in run.samples.get(kind, [])} for run in runs]
    return [[rows.get(sample) for rows in by_key] for sample in by_key[-1]]


def _sample_image(folder: str) -> Callable[[str], Markup]:
    """A function from a picture's path, or a small copy of it, to an `<img>` with the picture inside."""
    known: dict[str, Markup] = {}

    def picture(path: str) -> Markup:
        if path not in known:
            inside = path.startswith("data:")
            uri = path if inside else thumbnail(decode_image(ImageRef(Path(folder) / path)))
            style = "pixels" if uri.startswith("data:image/png") else ""
            name = "" if inside else path
            known[path] = Markup('<img alt="{}" class="{}" src="{}">').format(name, style, uri)
        return known[path]

    return picture


def _chart(name: str, width: float, height: float, draw: Callable[[Axes], None]) -> Markup:
    """A chart as SVG that takes the page's fonts and text color; width and height in inches at 72 units each."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # a run may have $ in its name
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        **{key: _INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
    }
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(name)}"', 1))


def _curves(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """A chart for each logged quantity, a line a run."""
    logged = [(number, run) for number, run in enumerate(runs) if run.log]

    def curve(key: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for number, run in logged:
                points = [(row["step"], row[key]) for row in run.log if key in row]
                if points:
                    color = RUN_COLORS[number % len(RUN_COLORS)] if len(logged) > 1 else IMAGE_COLOR
                    axes.plot(*zip(*points, strict=True), color=color, label=run.name)
            axes.set_xlabel("step")
            axes.grid(axis="y", alpha=0.15, color=_INK)
            axes.locator_params(nbins=5)
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if key != "temperature" else None)
            if len(logged) > 1:
                axes.legend(fontsize=8)

        return draw

    present = {key for _, run in logged for row in run.log for key in row}
    return [
        {"title": title, "svg": _chart(title, 3.4, 2.3, curve(key))} for key, title in CURVES.items() if key in present
    ]


def _maps(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """Each run's embeddings on their own two principal axes, all runs at one scale, centroids joined."""
    planes = {
        number: _plane(run.embeddings["images"], run.embeddings["texts"])
        for number, run in enumerate(runs)
        if "images" in run.embeddings
    }
    if not planes:
        return []
    wide, high = 1.06 * np.abs(np.concatenate([points for plane in planes.values() for points in plane])).max(axis=0)

    def scatter(images: np.ndarray, texts: np.ndarray) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for points, color, marker in ((images, IMAGE_COLOR, "o"), (texts, TEXT_COLOR, "^")):
                x, y = _thinned(points).T
                axes.scatter(x, y, s=14, c=color, marker=marker, alpha=0.5, linewidths=0)
            ends = np.stack([images.mean(axis=0), texts.mean(axis=0)])
            axes.plot(*ends.T, color=_INK, linewidth=1.4)
            for end, color, marker in zip(ends, (IMAGE_COLOR, TEXT_COLOR), "o^", strict=True):
                axes.scatter(end[0], end[1], s=90, c=color, marker=marker, edgecolors=_INK, linewidths=1.2, zorder=3)
            axes.set(xlim=(-wide, wide), ylim=(-high, high), aspect="equal", xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(visible=True, alpha=0.2)

        return draw

    return [
        {
            "title": runs[number].name,
            "gap": _number("geometry/", runs[number].results.get("geometry/modality_gap")),
            "svg": _chart(f"Map of {runs[number].name}", 4.2, min(4.2, 4.2 * high / wide + 0.1), scatter(*plane)),
        }
        for number, plane in planes.items()
    ]


def _plane(
    images: Float[np.ndarray, "images dim"], texts: Float[np.ndarray, "texts dim"]
) -> tuple[Float[np.ndarray, "images 2"], Float[np.ndarray, "texts 2"]]:
    """Both sides on the two principal axes of all rows together."""
    plane = PCA(2, random_state=0).fit(np.concatenate([images, texts]))
    return plane.transform(images), plane.transform(texts)


def _thinned(points: Float[np.ndarray, "points 2"]) -> Float[np.ndarray, "fewer 2"]:
    return points[np.unique(np.linspace(0, len(points) - 1, min(MAPPED, len(points))).astype(int))]


def _histograms(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """How alike matched and mismatched pairs are; all runs over one range of cosines."""
    counted = {number: run.samples["histogram"] for number, run in enumerate(runs) if "histogram" in run.samples}
    filled = [
        edge
        for counts in counted.values()
        for side in ("matched", "mismatched")
        for bin_, value in enumerate(counts[side])
        if value > 0
        for edge in counts["bins"][bin_ : bin_ + 2]
    ]

    def draw_counts(counts: dict[str, list[float]]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for side, color in (("mismatched", FADED_COLOR), ("matched", IMAGE_COLOR)):
                axes.stairs(counts[side], counts["bins"], fill=True, color=color, alpha=0.3)
                axes.stairs(counts[side], counts["bins"], color=color, linewidth=1.4)
            axes.set(xlim=(min(filled) - 0.05, max(filled) + 0.05), yticks=[], xlabel="cosine similarity")
            axes.spines["left"].set_visible(False)

        return draw

    return [
        {
            "title": runs[number].name,
            "svg": _chart(f"Similarities of {runs[number].name}", 4.6, 2.2, draw_counts(counts)),
        }
        for number, counts in counted.items()
    ]
