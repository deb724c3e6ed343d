"""Compute bootstrap intervals of differences between arms, over scenes and seeds together.

Two things vary by chance: which scenes were drawn, and how a run went. Each resample draws scenes with replacement, the
same for all runs, and seeds with replacement, the same for both arms where both have as many: it is paired both ways.
Three seeds make only ten different samples: their part in an interval is coarse, but it is there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from cafe.evaluation.suite import read_marks

NUM_RESAMPLES = 2000
LEVEL = 0.95
BATCH = 100  # resamples computed at once

Weights = Float[np.ndarray, "resamples groups"]
Values = Float[np.ndarray, " resamples"]


@dataclass(frozen=True, eq=False)
class Statistic:
    """Hold one result of one run as a function of how often each scene was drawn.

    Attributes:
        groups: the names of the scenes, in alphabetical order.
        compute: computes the result from the weight of each scene, for many draws at once.
    """

    groups: tuple[str, ...]
    compute: Callable[[Weights], Values]

    @property
    def value(self) -> float:
        """The result on the scenes as they are."""
        return float(self.compute(np.ones((1, len(self.groups))))[0])


def rate(rows: Sequence[Mapping[str, Any]], result: str) -> Statistic:
    """Make a result that is a sum of numerators over a sum of denominators, in percent; 0 where nothing counts."""
    rows = [row for row in rows if result in row["marks"]]
    groups, owner = _groups_of(rows)
    numerators, denominators = np.zeros(len(groups)), np.zeros(len(groups))
    for row, group in zip(rows, owner, strict=True):
        for name, numerator, denominator in read_marks(row):
            if name == result:
                numerators[group] += numerator
                denominators[group] += denominator

    def compute(weights: Weights) -> Values:
        """Divide the weighted sums."""
        total = weights @ denominators
        return 100 * np.divide(weights @ numerators, total, out=np.zeros(len(weights)), where=total > 0)

    return Statistic(groups, compute)


def auc(rows: Sequence[Mapping[str, Any]]) -> Statistic:
    """Make the area under the ROC curve of rows with a margin and a label, yes or no, in percent; ties count half."""
    groups, owner = _groups_of(rows)
    margins = np.array([row["margin"] for row in rows])
    is_yes = np.array([row["label"] == "yes" for row in rows])
    # Each distinct margin is a step of the curve.
    steps, step = np.unique(margins, return_inverse=True)

    def compute(weights: Weights) -> Values:
        """Count the weighted pairs of a yes above a no."""
        yes, no = (_sum_by(weights[:, owner[side]], step[side], len(steps)) for side in (is_yes, ~is_yes))
        below = np.cumsum(no, axis=1) - no / 2
        pairs = yes.sum(axis=1) * no.sum(axis=1)
        # Without a pair nothing is ranked, and that is chance.
        return 100 * np.divide((yes * below).sum(axis=1), pairs, out=np.full(len(weights), 0.5), where=pairs > 0)

    return Statistic(groups, compute)


def _sum_by(
    weights: Float[np.ndarray, "resamples rows"], step: np.ndarray, count: int
) -> Float[np.ndarray, "resamples steps"]:
    """Add up the weights of the rows of each step."""
    sums = np.zeros((len(weights), count))
    order = np.argsort(step, kind="stable")
    present, starts = np.unique(step[order], return_index=True)
    sums[:, present] = np.add.reduceat(weights[:, order], starts, axis=1)
    return sums


def gap(images: Float[np.ndarray, "images dim"], texts: Float[np.ndarray, "texts dim"], owner: np.ndarray) -> Statistic:
    """Make the modality gap: the distance of the centroids, where a text is drawn with its image."""
    groups = tuple(f"{number:06}" for number in range(len(images)))
    images, texts = images.astype(np.float64), texts.astype(np.float64)

    def compute(weights: Weights) -> Values:
        """Measure the distance of the weighted centroids."""
        of_texts = weights[:, owner]
        centers = weights @ images / weights.sum(axis=1, keepdims=True)
        return np.linalg.norm(centers - of_texts @ texts / of_texts.sum(axis=1, keepdims=True), axis=1)

    return Statistic(groups, compute)


def mean(parts: Sequence[Statistic]) -> Statistic:
    """Make the mean of several results, whose scenes may be the same: those are drawn together."""
    groups = tuple(sorted(set().union(*(part.groups for part in parts))))
    number = {group: index for index, group in enumerate(groups)}
    columns = [[number[group] for group in part.groups] for part in parts]

    def compute(weights: Weights) -> Values:
        """Average the parts."""
        values = [part.compute(weights[:, own]) for part, own in zip(parts, columns, strict=True)]
        return np.asarray(np.mean(values, axis=0))

    return Statistic(groups, compute)


def _groups_of(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], np.ndarray]:
    """List the groups of some rows, and the number of each row's group."""
    names, owner = np.unique([str(row.get("group", row.get("id"))) for row in rows], return_inverse=True)
    return tuple(names.tolist()), owner


@dataclass(frozen=True)
class Difference:
    """Hold the difference of two arms and its 95% interval, in the unit of the result."""

    value: float
    low: float
    high: float


def difference(
    first: Sequence[Statistic], second: Sequence[Statistic], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Difference:
    """Compute the mean of `first` over its seeds minus that of `second`, with the percentile bootstrap interval.

    Args:
        first: a result of an arm, by seed.
        second: the same result of the other arm, whose seeds are paired with the first one's if they are as many;
            otherwise, as for the base, which is one run, they are drawn on their own.
        num_resamples: number of resamples.
        seed: of the draws.

    Raises:
        ValueError: the runs were not measured on the same scenes.
    """
    groups = first[0].groups
    if any(each.groups != groups for each in [*first, *second]):
        raise ValueError("The runs were not measured on the same scenes.")
    rng = np.random.default_rng(seed)
    resampled = []
    for start in range(0, num_resamples, BATCH):
        count = min(BATCH, num_resamples - start)
        weights = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=count).astype(float)
        of_first = _draw_seeds(rng, count, len(first))
        of_second = of_first if len(first) == len(second) else _draw_seeds(rng, count, len(second))
        resampled.append(_mean_over(first, of_first, weights) - _mean_over(second, of_second, weights))
    low, high = np.quantile(np.concatenate(resampled), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = np.mean([each.value for each in first]) - np.mean([each.value for each in second])
    return Difference(float(value), float(low), float(high))


def _draw_seeds(rng: np.random.Generator, count: int, seeds: int) -> Float[np.ndarray, "resamples seeds"]:
    """Draw seeds with replacement, as the weight of each in the mean."""
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds


def _mean_over(runs: Sequence[Statistic], of_seeds: Float[np.ndarray, "resamples seeds"], weights: Weights) -> Values:
    """Average a result over the drawn seeds, on the drawn scenes."""
    values = np.stack([run.compute(weights) for run in runs], axis=1)
    return np.asarray((of_seeds * values).sum(axis=1))
