"""Set retrieval against generation: where each arm of an ablation stands, and which arms no other one dominates."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from jaxtyping import Bool, Float

from cafe.evaluation.suite import Suite, direction_of, is_percent, label_of, match_results

Results = Mapping[str, float]


@dataclass(frozen=True)
class Ablation:
    """Hold what was measured of several ways of training.

    Attributes:
        measured: by arm, the results of each seed.
        sweeps: by field of the recipe, its values in order, each with the arm that was trained with it.
        origin: the arm from whose recipe the sweeps depart.
    """

    measured: Mapping[str, Sequence[Results]]
    sweeps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    origin: str = "joint"

    @property
    def swept(self) -> dict[str, tuple[str, str]]:
        """By arm that a sweep alone trains, its field and value, with which its name ends."""
        places = [(arm, key, value) for key, values in self.sweeps.items() for value, arm in values.items()]
        return {arm: (key, value) for arm, key, value in places if arm.endswith(f" {key}={value}")}

    @property
    def names(self) -> list[str]:
        """The names of all results, each once: a suite may have results in some arms alone."""
        return list(dict.fromkeys(chain.from_iterable(chain.from_iterable(self.measured.values()))))


@dataclass(frozen=True)
class Panel:
    """Hold one chart of the trade-off.

    Attributes:
        arms: the arms that have both results.
        means: by arm, retrieval and generation, each the mean over the seeds.
        deviations: their standard deviations over the seeds; 0 for a single one.
        labels: what the two axes show.
        direction: 1 if more of the generation result is better, -1 if less is.
    """

    arms: list[str]
    means: Float[np.ndarray, "arms 2"]
    deviations: Float[np.ndarray, "arms 2"]
    labels: tuple[str, str]
    direction: int

    @property
    def on_front(self) -> Bool[np.ndarray, " arms"]:
        """Tell which arms are on the Pareto front of the means."""
        return pareto_front(self.means * np.array([1, self.direction]))


def pareto_front(points: Float[np.ndarray, "points 2"]) -> Bool[np.ndarray, " points"]:
    """Tell which points no other one dominates: is as good on both axes and better on one, where more is better."""
    # At [i, j]: how point j compares with point i.
    as_good = np.all(points[None] >= points[:, None], axis=2)
    better = np.any(points[None] > points[:, None], axis=2)
    return ~np.any(as_good & better, axis=1)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Compute the mean and the sample standard deviation, which is 0 for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), deviation


def trade_off_panels(ablation: Ablation, suites: Sequence[Suite]) -> list[Panel]:
    """Make a panel per suite that declares a generation result, against the first suite that declares retrieval.

    Panels with fewer than two arms are left out.
    """
    names = ablation.names
    retrieval = next(filter(None, (match_results(suite.retrieval, names) for suite in suites)), [])
    panels = []
    for suite in suites:
        generation = match_results(suite.generation, names)[:1]
        if retrieval and generation:
            panels.append(_panel(ablation, suites, retrieval, generation[0]))
    return [panel for panel in panels if len(panel.arms) > 1]


def _panel(ablation: Ablation, suites: Sequence[Suite], retrieval: Sequence[str], generation: str) -> Panel:
    """Make the panel of the mean of some retrieval results and a generation result."""
    arms, means, deviations = [], [], []
    for arm, runs in ablation.measured.items():
        coordinates = [_coordinates(run, retrieval, generation) for run in runs]
        # An arm of which a seed lacks a result, or has one that is not a number, has no place on the chart.
        if not coordinates or not all(map(math.isfinite, chain.from_iterable(coordinates))):
            continue
        axes = [mean_and_deviation(values) for values in zip(*coordinates, strict=True)]
        arms.append(arm)
        means.append([mean for mean, _ in axes])
        deviations.append([deviation for _, deviation in axes])
    direction = direction_of(suites, generation)
    labels = (_axis_label(suites, retrieval, 1), _axis_label(suites, [generation], direction))
    return Panel(arms, np.array(means).reshape(-1, 2), np.array(deviations).reshape(-1, 2), labels, direction)


def _coordinates(run: Results, retrieval: Sequence[str], generation: str) -> tuple[float, float]:
    """Return a run's retrieval and generation; not a number where it lacks a result."""
    return statistics.mean(run.get(name, math.nan) for name in retrieval), run.get(generation, math.nan)


def _axis_label(suites: Sequence[Suite], names: Sequence[str], direction: int) -> str:
    """Name what an axis shows: a result, or the mean of several."""
    label = "; ".join(label_of(suites, name) or name for name in names)
    if len(names) > 1:
        label = f"Mean of: {label}"
    unit = ", %" if is_percent(suites, names[0]) else ""
    note = " (lower is better)" if direction < 0 else ""
    return f"{label}{unit}{note}"
