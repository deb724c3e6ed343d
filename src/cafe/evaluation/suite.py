"""What a suite declares and what it measures: the schema that every suite fills and every report reads."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from cafe.evaluation.cached_model import CachedModel


@dataclass
class EvaluationResult:
    """Hold what was measured.

    Attributes:
        results: the flat `suite/part/metric` numbers; rates in percent.
        outputs: the rows of each part, one per sample: what was asked and what the model said. A row's "marks" name
            the results it counts for: `{"pope/random/accuracy": 1}`, or `[numerator, denominator]` where the
            denominator is not 1. A result with marks is the sum of the numerators over the sum of the denominators
            (`aggregate`), which the report resamples. "id" pairs the rows of two checkpoints; rows of one "group"
            (an image) are resampled together.
        samples: a few samples to look at, and what the report draws.
        embeddings: some embeddings of each side, for the report's map.
        about: what was evaluated: the data, the limit, the model's fingerprint.
        files: JSON for other programs, by the name of the file to write.
        means: results that are the plain mean of other results, by name.
    """

    results: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    means: dict[str, list[str]] = field(default_factory=dict)

    def add(self, other: "EvaluationResult") -> None:
        """Add what another suite measured. Samples and embeddings already present are kept."""
        self.results |= other.results
        self.outputs |= other.outputs
        self.files |= other.files
        self.means |= other.means
        # The report shows the samples and the map of the first dataset that was measured.
        self.samples = other.samples | self.samples
        self.embeddings = other.embeddings | self.embeddings

    def add_mean(self, name: str, parts: Sequence[str]) -> None:
        """Add a result that is the plain mean of other results."""
        self.results[name] = sum(self.results[part] for part in parts) / len(parts)
        # The report needs to know the parts: a mean has no marks of its own to resample.
        self.means[name] = list(parts)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Declare one thing that can be measured.

    A pattern below is the name of a result (`vqa/all`), or one in the syntax of `fnmatch` (`pope/*/neither`), where
    `*` also matches slashes.

    Attributes:
        name: the value for `--suite`, and the first word of the suite's results.
        measures: what it measures, in half a sentence.
        files: the files it expects in the folder of evaluation files, each with a description.
        download: where to download the files.
        sources: the published protocol.
        find_files: finds its files in a folder and returns them, or nothing if they are missing. Raises `CafeError` if
            two of them measure the same.
        run: measures a model on the files in a folder, on the first `limit` records of each.
        default: whether it runs when no suite is named; suites that take long do not.
        headline: patterns of the main results, in order: the tiles of the report and the rows of the ablation.
        retrieval: patterns of the results whose mean is one axis of the trade-off chart, of the first suite with any.
        generation: patterns of the result on its other axis, most telling first: the first that was measured is drawn.
        lower_is_better: patterns of the results in which less is better. In others, more is.
        no_direction: patterns of the results in which neither more nor less is better.
        labels: what the report calls a headline result, or the suite itself, where its own name does not do.
        in_percent: whether the results are rates in percent. Other results get three decimals and follow the rates.
    """

    name: str
    measures: str
    files: tuple[str, ...]
    download: str
    sources: tuple[str, ...] = ()
    find_files: Callable[[Path], list[Path]]
    run: Callable[[CachedModel, Path, int | None], EvaluationResult]
    default: bool = True
    headline: tuple[str, ...] = ()
    retrieval: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()
    lower_is_better: tuple[str, ...] = ()
    no_direction: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    in_percent: bool = True


def aggregate(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Compute each result that the rows have marks for, in percent; 0 where nothing counts."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        for name, numerator, denominator in read_marks(row):
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += numerator
            total[1] += denominator
    # A model that mentions no object has no precision: such a result counts as 0.
    rates = {}
    for name, (numerator, denominator) in sums.items():
        rates[name] = 100 * numerator / denominator if denominator else 0.0
    return rates


def read_marks(row: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Iterate over a row's marks as (result, numerator, denominator)."""
    for name, mark in row["marks"].items():
        # A plain number is short for a denominator of 1. Rows read back from JSON have lists.
        if isinstance(mark, (list, tuple)):
            numerator, denominator = mark
        else:
            numerator, denominator = mark, 1
        yield name, numerator, denominator


def headline_results(suites: Sequence[Suite], names: Sequence[str]) -> list[str]:
    """Select the main results among some names, in the order in which the suites declare them.

    Results that are not rates come last.
    """
    # `sorted` is stable: within each of the two kinds, the suites keep their order.
    rates_first = sorted(suites, key=lambda suite: not suite.in_percent)
    return match_results([pattern for suite in rates_first for pattern in suite.headline], names)


def match_results(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Select the results among some names that match any of some patterns, in the order of the patterns."""
    matches: list[str] = []
    for pattern in patterns:
        matches += [name for name in names if fnmatchcase(name, pattern)]
    # A result that two patterns match appears once, where the first one puts it.
    return list(dict.fromkeys(matches))


def direction_of(suites: Sequence[Suite], name: str) -> int:
    """Return 1 if more of a result is better, -1 if less is, and 0 if neither is."""
    # All suites are asked: a result need not begin with its suite's name (`objects/recall` belongs to "captions").
    for suite in suites:
        # A narrow exception in `no_direction` wins over a broad pattern in `lower_is_better`.
        if _matches_any(name, suite.no_direction):
            return 0
        if _matches_any(name, suite.lower_is_better):
            return -1
    return 1


def _matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a result's name matches at least one of some patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_percent(suites: Sequence[Suite], name: str) -> bool:
    """Return whether a result is a rate in percent."""
    suite_name = name.partition("/")[0]
    # A result that begins with no suite's name is a rate.
    return all(suite.in_percent for suite in suites if suite.name == suite_name)


def label_of(suites: Sequence[Suite], name: str) -> str | None:
    """Return what the suites call a result or a suite; None if they do not say."""
    for suite in suites:
        if name in suite.labels:
            return suite.labels[name]
    return None
