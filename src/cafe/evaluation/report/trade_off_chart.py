"""Draw the trade-off between retrieval and generation: a point per arm of an ablation, with the Pareto front."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath

from cafe.evaluation.report.charts import FADED_COLOR, INK, render_figure, run_color
from cafe.evaluation.report.labels import place_labels
from cafe.evaluation.report.trade_off import Ablation, Panel, trade_off_panels
from cafe.evaluation.suite import Suite

# Arms differ by marker as well as by color.
ARM_MARKERS, SWEEP_MARKERS = "s^Do", "ovPX"
FONT_SIZE = 9.0
MAX_LABEL = 24  # characters
FRONT_LINE: dict[str, Any] = {"color": FADED_COLOR, "linewidth": 1.2, "linestyle": (0, (4, 3))}
MIN_LEADER = 12.0  # points between a label and its marker
SAMPLE_SPACING, FRAME_MARGIN = 5.0, 4.0  # points

# Colors of a file that stands alone; within a page, the page sets them.
_ALONE = """<style>
:root { color: #1c1d20; background: #fff }
@media (prefers-color-scheme: dark) { :root { color: #e9e8e4; background: #1b1d20 } }
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif !important }
</style>"""

Points = Float[np.ndarray, "points 2"]


@dataclass(frozen=True)
class Style:
    """Hold how an arm, or the line of a sweep, is drawn."""

    label: str
    color: str
    marker: str


@dataclass(frozen=True)
class _View:
    """Hold a panel, of which all arms are to be seen, or those of the sweeps from close up."""

    panel: Panel
    close_up: bool

    def shows_closely(self, arm: str, ablation: Ablation) -> bool:
        """Tell whether an arm is one that the close-up is about."""
        return arm in ablation.swept or arm == ablation.origin

    def labels(self, arm: str, ablation: Ablation) -> bool:
        """Tell whether an arm has its label here: one of a sweep has it in the close-up."""
        return self.close_up or arm not in ablation.swept


def trade_off_chart(ablation: Ablation, suites: Sequence[Suite]) -> Markup | None:
    """Draw retrieval against each generation result, better upwards and to the right; None if there is none.

    Beside a panel of all arms is a close-up of those of the sweeps, which may lie closely together.
    """
    panels = trade_off_panels(ablation, suites)
    if not panels:
        return None
    views = [_View(panel, close_up) for panel in panels for close_up in (False, True)[: 1 + bool(ablation.swept)]]
    columns = min(2, len(views))
    rows = math.ceil(len(views) / columns)
    draw = partial(_draw_views, views=views, ablation=ablation, shape=(rows, columns))
    return render_figure("Retrieval against generation, by arm", 5.2 * columns, 0.4 + 3.5 * rows, draw)


def standalone_svg(chart: Markup) -> str:
    """Make a chart of the page a file of its own, readable in light and in dark."""
    start = chart.index(">") + 1
    return f'<?xml version="1.0" encoding="utf-8"?>\n{chart[:start]}{_ALONE}{chart[start:]}\n'


def _draw_views(figure: Figure, views: Sequence[_View], ablation: Ablation, shape: tuple[int, int]) -> None:
    """Draw all views with one legend, then the labels, for which the places of all points must be known."""
    styles, lines = _arm_styles(ablation), _sweep_styles(ablation)
    grid = list(figure.subplots(*shape, squeeze=False).flat)
    for axes in grid[len(views) :]:
        axes.remove()
    drawn = list(zip(grid, views, strict=False))
    for axes, view in drawn:
        _draw_points(axes, view.panel, styles)
        for name, path in _sweep_paths(view.panel, ablation).items():
            axes.plot(*path.T, color=lines[name].color, linewidth=1.2, zorder=1.5)
        _set_limits(axes, view, ablation)
        _draw_front(axes, view.panel)
    keys = [Line2D([], [], label="Pareto front of the means", **FRONT_LINE)]
    keys += [Line2D([], [], label=line.label, color=line.color, marker=line.marker) for line in lines.values()]
    figure.legend(handles=keys, loc="outside upper left", ncols=3, fontsize=FONT_SIZE)
    figure.draw_without_rendering()  # lays the views out
    for axes, view in drawn:
        _draw_labels(axes, view, ablation, styles)


def _arm_styles(ablation: Ablation) -> dict[str, Style]:
    """Choose how each arm is drawn: one of a sweep like the sweep's line, with its value, another with its name."""
    swept, lines = ablation.swept, _sweep_styles(ablation)
    named = [arm for arm in ablation.measured if arm not in swept]
    styles = {}
    for number, arm in enumerate(named):
        styles[arm] = Style(arm, run_color(number), ARM_MARKERS[number % len(ARM_MARKERS)])
    for arm, (name, value) in swept.items():
        label = value if len(value) <= MAX_LABEL else f"{value[: MAX_LABEL - 1]}…"
        styles[arm] = replace(lines[name], label=label)
    return styles


def _sweep_styles(ablation: Ablation) -> dict[str, Style]:
    """Choose how the line of each sweep is drawn, in the colors that the named arms leave."""
    first = len(ablation.measured) - len(ablation.swept)
    styles = {}
    for number, name in enumerate(ablation.sweeps):
        marker = SWEEP_MARKERS[number % len(SWEEP_MARKERS)]
        styles[name] = Style(f"{ablation.origin}, by {name}", run_color(first + number), marker)
    return styles


def _sweep_paths(panel: Panel, ablation: Ablation) -> dict[str, Points]:
    """List the points of each sweep, in the order of its values."""
    paths = {}
    for name, values in ablation.sweeps.items():
        rows = [panel.arms.index(arm) for arm in values.values() if arm in panel.arms]
        paths[name] = panel.means[rows]
    return paths


def _draw_points(axes: Axes, panel: Panel, styles: Mapping[str, Style]) -> None:
    """Draw the points of a panel with their whiskers, filled where they are on the front."""
    for arm, mean, deviation, filled in zip(panel.arms, panel.means, panel.deviations, panel.on_front, strict=True):
        style = styles[arm]
        axes.errorbar(
            mean[0],
            mean[1],
            xerr=deviation[0] or None,
            yerr=deviation[1] or None,
            fmt=style.marker,
            color=style.color,
            markersize=6.5,
            markerfacecolor=style.color if filled else "none",
            elinewidth=0.8,
        )
    axes.set(xlabel=panel.labels[0], ylabel=panel.labels[1])
    axes.grid(alpha=0.12, color=INK)


def _set_limits(axes: Axes, view: _View, ablation: Ablation) -> None:
    """Set the limits of a view, with room for labels; what is drawn later does not move them."""
    panel = view.panel
    seen = [view.shows_closely(arm, ablation) or not view.close_up for arm in panel.arms]
    means, deviations = panel.means[seen], panel.deviations[seen]
    low, high = (means - deviations).min(axis=0), (means + deviations).max(axis=0)
    margin = np.maximum(0.14 * (high - low), 0.5)
    (left, bottom), (right, top) = low - margin, high + margin
    # Better is always upwards.
    axes.set(xlim=(left, right), ylim=(bottom, top) if panel.direction > 0 else (top, bottom))


def _draw_front(axes: Axes, panel: Panel) -> None:
    """Draw the border of what the arms on the front dominate, and shade that."""
    stairs = _stairs(panel)
    axes.plot(*stairs.T, zorder=1, **FRONT_LINE)
    corner = [[stairs[0, 0], stairs[-1, 1]]]
    axes.fill(*np.concatenate([stairs, corner]).T, color=FADED_COLOR, alpha=0.07, linewidth=0)


def _stairs(panel: Panel) -> Points:
    """Return the corners of the border between what the arms on the front dominate and what they do not."""
    front = panel.means[panel.on_front]
    front = front[np.argsort(front[:, 0], kind="stable")]
    # Both ends are beyond the limits of every view.
    extent = np.ptp(panel.means, axis=0) + 2 * panel.deviations.max(axis=0) + 10
    left = panel.means[:, 0].min() - extent[0]
    worst = (panel.direction * panel.means[:, 1]).min() - extent[1]
    corners = [[left, front[0, 1]]]
    for point, following in zip(front, [*front[1:, 1], panel.direction * worst], strict=True):
        corners += [point.tolist(), [point[0], following]]
    return np.array(corners)


def _draw_labels(axes: Axes, view: _View, ablation: Ablation, styles: Mapping[str, Style]) -> None:
    """Write the labels of a view near their points, with a line to the point where they are apart."""
    panel, to_pixels = view.panel, axes.transData.transform
    pixels, frame = to_pixels(panel.means), axes.get_window_extent().get_points()
    in_frame = ((pixels > frame[0]) & (pixels < frame[1])).all(axis=1)
    rows = [row for row in np.flatnonzero(in_frame) if view.labels(panel.arms[row], ablation)]
    labels = [styles[panel.arms[row]].label for row in rows]
    sizes = np.array([_text_size(label) for label in labels]).reshape(-1, 2)

    paths = [_stairs(panel), *_sweep_paths(panel, ablation).values(), *_whiskers(panel, 0), *_whiskers(panel, 1)]
    lines = np.concatenate([_sample(to_pixels(path)) for path in paths])
    lines = lines[((lines > frame[0]) & (lines < frame[1])).all(axis=1)]
    inner = frame + np.array([[FRAME_MARGIN], [-FRAME_MARGIN]])
    centers = place_labels(pixels[rows], sizes, pixels[in_frame], lines, inner)

    to_data = axes.transData.inverted().transform
    for row, label, size, center in zip(rows, labels, sizes, centers, strict=True):
        x, y = to_data(center)
        axes.text(x, y, label, ha="center", va="center", fontsize=FONT_SIZE, in_layout=False, zorder=4)
        edge = np.clip(pixels[row], center - size / 2 - 1, center + size / 2 + 1)
        if np.linalg.norm(edge - pixels[row]) > MIN_LEADER:
            color = styles[panel.arms[row]].color
            axes.plot(*to_data(np.stack([pixels[row], edge])).T, color=color, alpha=0.7, linewidth=0.7, zorder=1)


def _text_size(label: str) -> tuple[float, float]:
    """Return the width and height of a label in points."""
    return TextPath((0, 0), label, size=FONT_SIZE).get_extents().width, FONT_SIZE


def _whiskers(panel: Panel, axis: int) -> Float[np.ndarray, "arms 2 2"]:
    """Return the ends of each arm's whisker along an axis."""
    offsets = np.zeros_like(panel.means)
    offsets[:, axis] = panel.deviations[:, axis]
    return np.stack([panel.means - offsets, panel.means + offsets], axis=1)


def _sample(path: Points) -> Float[np.ndarray, "samples 2"]:
    """Sample a path of straight lines every few units."""
    samples = [path]
    for start, end in pairwise(path):
        count = int(np.linalg.norm(end - start) / SAMPLE_SPACING) + 1
        samples.append(np.linspace(start, end, count))
    return np.concatenate(samples)
