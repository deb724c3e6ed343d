"""Draw the report's charts as SVG, in the page's own fonts and text color."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from cafe.evaluation.report.run import LoadedRun

# The logged quantities that get a chart, in order, with the chart's title.
CURVES = {
    "loss": "Loss",
    "lm_loss": "Language-modeling loss",
    "contrastive_loss": "Contrastive loss",
    "accuracy": "Pairs found in the batch",
    "grad_norm_lm": "Gradient norm, language",
    "grad_norm_contrastive": "Gradient norm, contrastive",
    "temperature": "Temperature",
    "lr": "Learning rate",
}
MAX_MAP_POINTS = 300  # of each side

IMAGE_COLOR, TEXT_COLOR, FADED_COLOR = "#2a78d6", "#eb6834", "#8a8f98"
RUN_COLORS = ("#2a78d6", "#eb6834", "#1baf7a", "#8a5cd6", "#d64a8a", "#a88a1c")
INK = "#0a0b0c"  # a placeholder that becomes `currentColor` in the page

Draw = Callable[[Axes], None]
Points = Float[np.ndarray, "points 2"]


def run_color(number: int) -> str:
    """Return the color of a run by its place in the report."""
    return RUN_COLORS[number % len(RUN_COLORS)]


def interval_chart(runs: Sequence[LoadedRun], labels: Mapping[str, str]) -> Markup | None:
    """Draw results as points with their intervals, a row per result; None if no run has an interval of any.

    Args:
        runs: the runs.
        labels: the results to show, in order, with what to call them.
    """
    rows = [name for name in labels if any(name in run.intervals for run in runs)]
    if not rows:
        return None
    height = 0.7 + len(rows) * (0.2 + 0.16 * len(runs))
    draw = partial(_draw_interval_chart, runs=runs, rows=rows, labels=labels)
    return _render("Headline results with intervals", 9.6, height, draw)


def _draw_interval_chart(axes: Axes, runs: Sequence[LoadedRun], rows: Sequence[str], labels: Mapping[str, str]) -> None:
    """Draw the points of all runs; those of one result lie closely above one another, around its label."""
    spacing = 0.6 / len(runs)
    for number, run in enumerate(runs):
        offset = spacing * (number - (len(runs) - 1) / 2)
        _draw_intervals(axes, run, rows, offset, run_color(number))
    axes.set(yticks=range(len(rows)), yticklabels=[labels[name] for name in rows], xlabel="percent")
    axes.invert_yaxis()  # the first result at the top
    axes.set_xlim(-2, 102)
    axes.grid(axis="x", alpha=0.15, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _draw_intervals(axes: Axes, run: LoadedRun, rows: Sequence[str], offset: float, color: str) -> None:
    """Draw the points of one run, in the rows of which it has an interval.

    Args:
        axes: the chart.
        run: the run.
        rows: the results, from top to bottom.
        offset: how far below the middle of a row its point is, in rows.
        color: of the run.
    """
    present = [name for name in rows if name in run.intervals]
    positions = np.array(list(map(rows.index, present)))
    values = np.array([run.results[name] for name in present])
    # Without any row, the array would have no second axis. Matplotlib takes the distances of the ends from the point.
    ends = np.array([run.intervals[name] for name in present]).reshape(-1, 2)
    errors = np.abs(ends.T - values)
    axes.errorbar(values, positions + offset, xerr=errors, fmt="o", color=color, markersize=4.5, label=run.name)


def training_charts(runs: Sequence[LoadedRun]) -> list[dict[str, Any]]:
    """Draw a chart per logged quantity, with a line per run that has a log."""
    colored = [(run, run_color(number)) for number, run in enumerate(runs) if run.log]
    # A single curve has the first color, whichever run it is of.
    if len(colored) == 1:
        colored = [(colored[0][0], IMAGE_COLOR)]
    present: set[str] = set()
    for run, _ in colored:
        present.update(*run.log)
    charts = []
    for key, title in CURVES.items():
        if key in present:
            svg = _render(title, 3.4, 2.3, partial(_draw_curves, colored=colored, key=key))
            charts.append({"title": title, "svg": svg})
    return charts


def _draw_curves(axes: Axes, colored: Sequence[tuple[LoadedRun, str]], key: str) -> None:
    """Draw a logged quantity by step.

    Args:
        axes: the chart.
        colored: the runs with a log and their colors.
        key: of the quantity in the rows of the logs; a run may lack it.
    """
    for run, color in colored:
        points = [(row["step"], row[key]) for row in run.log if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, label=run.name)
    axes.set_xlabel("step")
    axes.grid(axis="y", alpha=0.15, color=INK)
    axes.locator_params(nbins=5)
    # All start at 0 but the temperature, which moves little, far from 0.
    if key == "temperature":
        axes.set_ylim(bottom=None)
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    if len(colored) > 1:
        axes.legend(fontsize=8)


def embedding_maps(runs: Sequence[LoadedRun]) -> list[dict[str, Any]]:
    """Draw each run's embeddings on their two principal axes, all runs at the same scale, with the centroids joined."""
    mapped = [run for run in runs if "images" in run.embeddings]
    if not mapped:
        return []
    planes = [_project(run.embeddings["images"], run.embeddings["texts"]) for run in mapped]
    # The origin is the center of every map. A margin keeps the outermost points off the frame.
    all_points = np.concatenate(list(chain.from_iterable(planes)))
    width, height = 1.06 * np.abs(all_points).max(axis=0)
    width, height = max(width, 1e-6), max(height, 1e-6)  # all embeddings may be equal
    svg_height = min(4.2, 4.2 * height / width + 0.1)
    charts = []
    for run, (images, texts) in zip(mapped, planes, strict=True):
        draw = partial(_draw_map, images=images, texts=texts, limits=(width, height))
        svg = _render(f"Map of {run.name}", 4.2, svg_height, draw)
        charts.append({"title": run.name, "gap": _modality_gap(run), "svg": svg})
    return charts


def _draw_map(axes: Axes, images: Points, texts: Points, limits: tuple[float, float]) -> None:
    """Draw the points of both sides and their centroids.

    Args:
        axes: the chart.
        images: the points of the images.
        texts: the points of the texts.
        limits: the largest distances from the origin that are shown, along each axis.
    """
    sides = ((images, IMAGE_COLOR, "o"), (texts, TEXT_COLOR, "^"))
    for points, color, marker in sides:
        x, y = _subsample(points).T
        axes.scatter(x, y, s=14, c=color, marker=marker, alpha=0.5, linewidths=0)
    # The line between the centroids is the modality gap, as far as the plane shows it.
    centroids = np.stack([images.mean(axis=0), texts.mean(axis=0)])
    axes.plot(*centroids.T, color=INK, linewidth=1.4)
    for (x, y), (_, color, marker) in zip(centroids, sides, strict=True):
        axes.scatter(x, y, s=90, c=color, marker=marker, edgecolors=INK, linewidths=1.2, zorder=3)
    width, height = limits
    axes.set(xlim=(-width, width), ylim=(-height, height), aspect="equal", xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, alpha=0.2)


def _project(
    images: Float[np.ndarray, "images dim"], texts: Float[np.ndarray, "texts dim"]
) -> tuple[Float[np.ndarray, "images 2"], Float[np.ndarray, "texts 2"]]:
    """Project both sides on the two principal axes of all rows together."""
    plane = PCA(2, random_state=0).fit(np.concatenate([images, texts]))
    return plane.transform(images), plane.transform(texts)


def _subsample(points: Points) -> Points:
    """Choose evenly spaced points, as many as a map can show."""
    count = min(MAX_MAP_POINTS, len(points))
    return points[np.unique(np.linspace(0, len(points) - 1, count).astype(int))]


def _modality_gap(run: LoadedRun) -> str:
    """Format the gap of the embeddings on the map, which are those of the first collection that was measured."""
    for name, value in run.results.items():
        if name.endswith("/modality_gap"):
            return f"{value:.3f}"
    return "–"


def similarity_histograms(runs: Sequence[LoadedRun]) -> list[dict[str, Any]]:
    """Draw how similar matched and mismatched pairs are, all runs over the same range of cosines."""
    counted = [(run.name, run.samples["histogram"]) for run in runs if "histogram" in run.samples]
    if not counted:
        return []
    edges = list(chain.from_iterable(_filled_edges(counts) for _, counts in counted))
    if not edges:  # all bins are empty
        return []
    xlim = (min(edges) - 0.05, max(edges) + 0.05)
    charts = []
    for name, counts in counted:
        svg = _render(f"Similarities of {name}", 4.6, 2.2, partial(_draw_histogram, counts=counts, xlim=xlim))
        charts.append({"title": name, "svg": svg})
    return charts


def _draw_histogram(axes: Axes, counts: dict[str, list[float]], xlim: tuple[float, float]) -> None:
    """Draw the two histograms of a run, matched pairs in front."""
    for side, color in (("mismatched", FADED_COLOR), ("matched", IMAGE_COLOR)):
        axes.stairs(counts[side], counts["bins"], fill=True, color=color, alpha=0.3)
        axes.stairs(counts[side], counts["bins"], color=color, linewidth=1.4)
    axes.set(xlim=xlim, yticks=[], xlabel="cosine similarity")
    axes.spines["left"].set_visible(False)


def _filled_edges(counts: dict[str, list[float]]) -> list[float]:
    """List the edges of the bins in which there is anything."""
    edges = []
    for side in ("matched", "mismatched"):
        for number, value in enumerate(counts[side]):
            # Bin i lies between edges i and i + 1.
            if value > 0:
                edges += counts["bins"][number : number + 2]
    return edges


def _render(name: str, width: float, height: float, draw: Draw) -> Markup:
    """Render a chart of one pair of axes, see `render_figure`."""
    return render_figure(name, width, height, lambda figure: draw(figure.add_subplot()))


def render_figure(name: str, width: float, height: float, draw: Callable[[Figure], None]) -> Markup:
    """Render a figure as SVG.

    Args:
        name: what a screen reader calls it.
        width: in inches, at 72 units each.
        height: in inches.
        draw: draws it.
    """
    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text, in the page's font
        "svg.hashsalt": name,  # ids that are the same in every run of the program
        "text.parse_math": False,  # a run's name may contain $
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with rc_context(style):
        figure = Figure(figsize=(width, height), dpi=72, layout="constrained")  # as in the file: a pixel is a point
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    # The metadata holds the date, and what comes before the tag is not HTML.
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(name)}"', 1))
