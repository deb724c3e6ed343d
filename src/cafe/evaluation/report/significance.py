"""Compute how certain a result is: bootstrap intervals, and paired tests between two checkpoints. All are seeded.

Everything starts from the marks of per-sample outputs (`EvaluationResult.outputs`): a result is the sum of its
numerators over the sum of its denominators. Samples of one group (an image with its captions or questions) are not
independent, so whole groups are resampled, never single samples.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from cafe.evaluation.suite import read_marks

NUM_RESAMPLES = 2000  # of the bootstrap and of the permutation test
CONFIDENCE_LEVEL = 0.95
BATCH_SIZE = 64  # resamples that SciPy draws at once: few enough to stay in the processor's cache


@dataclass(frozen=True, eq=False)
class SampleTally:
    """Hold one result's marks, summed by group.

    Attributes:
        groups: the groups' names in alphabetical order, so that equal groups are resampled alike in every result.
        numerators: the sum of the numerators of each group.
        denominators: the sum of the denominators of each group.
        marks: by sample id, its numerator and denominator.
    """

    groups: tuple[str, ...]
    numerators: Float[np.ndarray, " groups"]
    denominators: Float[np.ndarray, " groups"]
    marks: Mapping[str, tuple[float, float]]

    @property
    def value(self) -> float:
        """The result, in percent."""
        return float(_rate(self.numerators, self.denominators))


@dataclass(frozen=True)
class Comparison:
    """Hold the difference between two checkpoints in one result.

    Attributes:
        difference: second minus first, in percentage points.
        low: the lower end of its bootstrap interval.
        high: the upper end.
        permutation: p of the paired permutation test: how often a difference as large arises when the outputs of the
            two checkpoints are swapped at random, group by group.
        mcnemar: p of McNemar's exact test, for results in which a sample is right or wrong; None for others.
    """

    difference: float
    low: float
    high: float
    permutation: float
    mcnemar: float | None


def tally_results(rows: Iterable[Mapping[str, Any]]) -> dict[str, SampleTally]:
    """Tally each result that the rows have marks for."""
    sums: dict[str, dict[str, list[float]]] = {}
    marks: dict[str, dict[str, tuple[float, float]]] = {}
    for number, row in enumerate(rows):
        sample = str(row.get("id", number))
        group = str(row.get("group", sample))
        for name, numerator, denominator in read_marks(row):
            # By group for resampling, by sample for McNemar's test.
            total = sums.setdefault(name, {}).setdefault(group, [0.0, 0.0])
            total[0] += numerator
            total[1] += denominator
            marks.setdefault(name, {})[sample] = (float(numerator), float(denominator))
    results = {}
    for name, by_group in sums.items():
        groups = sorted(by_group)
        numerators, denominators = np.array([by_group[group] for group in groups]).T
        results[name] = SampleTally(tuple(groups), numerators, denominators, marks[name])
    return results


def bootstrap_interval(parts: Sequence[SampleTally], num_resamples: int = NUM_RESAMPLES) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of a result, in percent (Efron, 1979).

    Args:
        parts: the result's tally; or several, of which the result is the mean. Parts with the same groups (POPE's
            splits, which ask about the same images) are resampled together, others independently.
        num_resamples: number of bootstrap resamples.
    """
    return _percentile_interval(np.mean([_resample(part, num_resamples) for part in parts], axis=0))


def compare(
    first: Sequence[SampleTally], second: Sequence[SampleTally], num_resamples: int = NUM_RESAMPLES
) -> Comparison | None:
    """Compare two checkpoints in one result; None if their outputs are not of the same samples.

    Args:
        first: the result's tally of the first checkpoint; or several, of which the result is the mean.
        second: that of the second checkpoint.
        num_resamples: number of bootstrap resamples and of random swaps.
    """
    if len(first) != len(second):
        return None
    pairs = list(zip(first, second, strict=True))
    if not all(_have_same_samples(a, b) for a, b in pairs):
        return None
    difference = float(np.mean([b.value - a.value for a, b in pairs]))
    # Both sides of a pair have the same groups, so each resample holds the same images on both sides: it is paired.
    resampled = [_resample(b, num_resamples) - _resample(a, num_resamples) for a, b in pairs]
    low, high = _percentile_interval(np.mean(resampled, axis=0))
    swapped = np.mean([_swap(a, b, num_resamples) for a, b in pairs], axis=0)

    # Equal differences may differ in their last bits. The observed one counts as a permutation too, so p is above 0.
    extreme = 1 + np.count_nonzero(np.abs(swapped) >= abs(difference) - 1e-9)
    exact = _mcnemar_of_marks(*pairs[0]) if len(pairs) == 1 else None
    return Comparison(difference, low, high, float(extreme / (1 + num_resamples)), exact)


def _have_same_samples(first: SampleTally, second: SampleTally) -> bool:
    """Return whether two tallies are of the same samples in the same groups, so that they can be paired."""
    return first.groups == second.groups and first.marks.keys() == second.marks.keys()


def mcnemar(only_first: int, only_second: int) -> float:
    """Compute McNemar's exact p: the two-sided binomial test of the samples that only one checkpoint gets right."""
    discordant = only_first + only_second
    if discordant == 0:  # SciPy tests at least one sample
        return 1.0
    return float(stats.binomtest(only_first, discordant).pvalue)


def _mcnemar_of_marks(first: SampleTally, second: SampleTally) -> float | None:
    """Compute McNemar's p of two tallies; None unless every sample is right or wrong."""
    right = []
    for tally in (first, second):
        # In the first tally's order, so that the rows of both are of the same samples.
        marks = np.array([tally.marks[sample] for sample in first.marks])
        numerators, denominators = marks.T
        is_binary = np.isin(numerators, (0, 1)).all()
        if not is_binary or (denominators != 1).any():
            return None
        right.append(numerators == 1)
    only_first, only_second = right[0] & ~right[1], right[1] & ~right[0]
    return mcnemar(int(only_first.sum()), int(only_second.sum()))


# A result's own interval and its comparisons need the same resamples.
@lru_cache(maxsize=1024)
def _resample(tally: SampleTally, num_resamples: int) -> Float[np.ndarray, " resamples"]:
    """Draw bootstrap resamples of a result, in percent; the same groups are drawn for all tallies with equal groups."""
    # All resamples of one group are equal; SciPy refuses to draw them.
    if len(tally.groups) == 1:
        return np.full(num_resamples, tally.value)
    resamples = stats.bootstrap(
        (tally.numerators, tally.denominators),
        _rate,
        paired=True,
        vectorized=True,
        n_resamples=num_resamples,
        batch=BATCH_SIZE,
        method="percentile",
        random_state=np.random.default_rng(_seed(tally)),
    )
    distribution: Float[np.ndarray, " resamples"] = resamples.bootstrap_distribution
    return distribution


def _swap(first: SampleTally, second: SampleTally, num_resamples: int) -> Float[np.ndarray, " resamples"]:
    """Draw differences between two checkpoints whose groups are swapped at random.

    `scipy.stats.permutation_test` permutes each group's pair on its own, which takes ten times as long, and lists all
    swaps where they are few, so that the parts of a mean would have unequal numbers of them.
    """
    random = np.random.default_rng(_seed(first))
    swaps = random.integers(2, size=(num_resamples, len(first.groups)), dtype=np.uint8).astype(float)
    before, after = (np.stack([tally.numerators, tally.denominators]) for tally in (first, second))
    # A swapped group takes its sums along: what the first checkpoint gains by it, the second loses.
    gained = (after - before) @ swaps.T
    first_rates = _percent(*(before.sum(axis=-1, keepdims=True) + gained))
    second_rates = _percent(*(after.sum(axis=-1, keepdims=True) - gained))
    return second_rates - first_rates


def _seed(tally: SampleTally) -> int:
    """Return the seed of the draws: equal for equal groups, different for others."""
    return zlib.crc32("\n".join(tally.groups).encode())


def _rate(numerators: np.ndarray, denominators: np.ndarray, axis: int = -1) -> Any:
    """Compute a result from the sums of its groups along an axis, in percent."""
    return _percent(numerators.sum(axis=axis), denominators.sum(axis=axis))


def _percent(numerators: Any, denominators: Any) -> Any:
    """Divide, in percent; 0 where nothing counts."""
    # `divide` leaves these where it does not divide.
    zeros = np.zeros_like(numerators, dtype=float)
    return 100 * np.divide(numerators, denominators, out=zeros, where=np.asarray(denominators) != 0)


def _percentile_interval(values: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    """Compute the interval that holds the middle of some values, as much of them as the confidence level says."""
    low, high = np.quantile(values, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return float(low), float(high)
