"""How sure a result is: bootstrap intervals, and paired tests between two checkpoints. Plain NumPy, seeded.

Everything works on the marks of per-sample outputs (`suite.Evaluation.outputs`): a result is the sum of its numerators
over the sum of its denominators. Samples of one group (a picture with its captions or questions) are not independent:
groups are resampled, never single samples.
"""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

NUM_RESAMPLES = 2000  # of the bootstrap and of the permutation test
LEVEL = 0.95


@dataclass(frozen=True)
class SampleTally:
    """One result's marks, summed by group.

    Attributes:
        groups: their names in alphabetical order, so that the same groups are drawn alike wherever they come from.
        numerators: numerators.
        denominators: denominators.
        marks: for each sample's id, its numerator and denominator.
    """

    groups: tuple[str, ...]
    numerators: Float[np.ndarray, " groups"]
    denominators: Float[np.ndarray, " groups"]
    marks: Mapping[str, tuple[float, float]]

    @property
    def value(self) -> float:
        """The result, in percent."""
        return float(_percent(self.numerators.sum(), self.denominators.sum()))


@dataclass(frozen=True)
class Comparison:
    """What separates the second checkpoint from the first in one result.

    Attributes:
        difference: second minus first, in points of percent.
        low, high: its bootstrap interval.
        permutation: p of the paired permutation test: how often a difference as large comes of swapping the two
            checkpoints' outputs by lot, group by group.
        mcnemar: p of McNemar's exact test, for results in which a sample is right or wrong; None for others.
    """

    difference: float
    low: float
    high: float
    permutation: float
    mcnemar: float | None


def tallies(rows: Iterable[Mapping[str, Any]]) -> dict[str, SampleTally]:
    """The tally of each result that the rows bear marks for."""
    summed: dict[str, dict[str, list[float]]] = {}
    marks: dict[str, dict[str, tuple[float, float]]] = {}
    for number, row in enumerate(rows):
        name = str(row.get("id", number))
        group = str(row.get("group", name))
        for metric, mark in row["marks"].items():
            part, whole = mark if isinstance(mark, (list, tuple)) else (mark, 1)
            total = summed.setdefault(metric, {}).setdefault(group, [0.0, 0.0])
            total[0] += part
            total[1] += whole
            marks.setdefault(metric, {})[name] = (float(part), float(whole))
    done = {}
    for metric, groups in summed.items():
        names = sorted(groups)
        parts, wholes = np.array([groups[name] for name in names]).T
        done[metric] = SampleTally(tuple(names), parts, wholes, marks[metric])
    return done


def interval(result: Sequence[SampleTally], draws: int = NUM_RESAMPLES) -> tuple[float, float]:
    """The percentile bootstrap interval of a result, in percent (Efron, 1979).

    Args:
        result: its tally; or several, of which the result is the mean. Parts with the same groups (POPE's splits, which
            ask about the same pictures) are resampled together, others apart.
        draws: resamples.
    """
    drawn = []
    for tally in result:
        weights = _resamples(len(tally.groups), draws, _seed(tally))
        drawn.append(_percent(weights @ tally.numerators, weights @ tally.denominators))
    return _middle(np.mean(drawn, axis=0))


def compare(
    first: Sequence[SampleTally], second: Sequence[SampleTally], draws: int = NUM_RESAMPLES
) -> Comparison | None:
    """The second result beside the first, part by part; None if they are not of the same samples."""
    pairs = list(zip(first, second, strict=False))
    if len(first) != len(second) or any(
        a.marks.keys() != b.marks.keys() or set(a.groups) != set(b.groups) for a, b in pairs
    ):
        return None
    observed, resampled, swapped = (
        np.mean(values, axis=0) for values in zip(*(_drawn(*pair, draws) for pair in pairs), strict=True)
    )
    low, high = _middle(resampled)
    extreme = int((np.abs(swapped) >= abs(observed) - 1e-9).sum())
    exact = _mcnemar(*pairs[0]) if len(pairs) == 1 else None
    return Comparison(float(observed), low, high, (1 + extreme) / (1 + draws), exact)


def _drawn(
    first: SampleTally, second: SampleTally, draws: int
) -> tuple[float, Float[np.ndarray, " draws"], Float[np.ndarray, " draws"]]:
    """The difference of a result's part: as it is, in each resample, and in each draw of swaps."""
    order = {group: number for number, group in enumerate(second.groups)}
    aligned = [order[group] for group in first.groups]
    parts = np.stack([first.numerators, second.numerators[aligned]], axis=1)
    wholes = np.stack([first.denominators, second.denominators[aligned]], axis=1)

    def differences(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
        rates = _percent(parts, wholes)
        return rates[..., 1] - rates[..., 0]

    count, seed = len(first.groups), _seed(first)
    weights, swaps = _resamples(count, draws, seed), _swaps(count, draws, seed)
    return (
        float(differences(parts.sum(axis=0), wholes.sum(axis=0))),
        differences(weights @ parts, weights @ wholes),
        differences(*(_swapped(side, swaps) for side in (parts, wholes))),
    )


def _seed(tally: SampleTally) -> int:
    """Of the draws: one for the same groups, another for others."""
    return zlib.crc32("\n".join(tally.groups).encode())


def _swapped(
    side: Float[np.ndarray, "groups 2"], swaps: Float[np.ndarray, "draws groups"]
) -> Float[np.ndarray, "draws 2"]:
    """Both checkpoints' sums, the chosen groups of each draw exchanged."""
    moved = swaps @ (side[:, 1] - side[:, 0])
    return side.sum(axis=0) + moved[:, None] * np.array([1, -1])


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p that samples which one checkpoint alone gets right are as often the first's as the second's."""
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    logs = [
        math.lgamma(discordant + 1) - math.lgamma(k + 1) - math.lgamma(discordant - k + 1) for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(log - discordant * math.log(2)) for log in logs))


def _mcnemar(first: SampleTally, second: SampleTally) -> float | None:
    pairs = [(first.marks[name], second.marks[name]) for name in first.marks]
    if any(whole != 1 or part not in (0, 1) for pair in pairs for part, whole in pair):
        return None
    return mcnemar(sum(a > b for (a, _), (b, _) in pairs), sum(b > a for (a, _), (b, _) in pairs))


@lru_cache(maxsize=1)  # the results of one part have the same groups
def _resamples(count: int, draws: int, seed: int) -> Float[np.ndarray, "draws groups"]:
    """How often each of `count` groups is drawn in each resample."""
    drawn = np.random.default_rng(seed).integers(count, size=(draws, count)) + count * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count).astype(np.float32)


@lru_cache(maxsize=1)
def _swaps(count: int, draws: int, seed: int) -> Float[np.ndarray, "draws groups"]:
    """1 where a draw swaps a group, 0 elsewhere."""
    return np.random.default_rng(seed).integers(2, size=(draws, count), dtype=np.uint8).astype(np.float32)


def _percent(parts: Any, wholes: Any) -> Any:
    """Numerators over denominators in percent; 0 where nothing counts."""
    return 100 * np.divide(parts, wholes, out=np.zeros_like(parts, dtype=float), where=np.asarray(wholes) != 0)


def _middle(values: np.ndarray) -> tuple[float, float]:
    """Where the middle `LEVEL` of the values lie."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
