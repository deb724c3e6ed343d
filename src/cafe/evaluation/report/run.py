"""Read what `cafe evaluate` and a training run wrote about a checkpoint."""

import logging
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from cafe.errors import CafeError
from cafe.evaluation.report.significance import SampleTally, bootstrap_interval, tally_results
from cafe.evaluation.stored import (
    read_embeddings,
    read_log,
    read_means,
    read_outputs,
    read_results,
    read_samples,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportRun:
    """Name one evaluated checkpoint: the directory that `runner.write` filled, and its training's `log.jsonl`."""

    name: str
    directory: Path
    log: Path | None = None


@dataclass(frozen=True)
class LoadedRun:
    """Hold a run's files.

    Attributes:
        name: the run's name in the report.
        results: `results.json`.
        samples: `samples.json`.
        embeddings: the arrays of `embeddings.npz`.
        log: the rows of the training log; empty without one.
        tallies: by result, its tally, or several where the result is a mean; none for results without outputs.
        intervals: by result, its bootstrap interval.
    """

    name: str
    results: dict[str, float]
    samples: dict[str, Any]
    embeddings: dict[str, np.ndarray]
    log: list[dict[str, float]]
    tallies: dict[str, list[SampleTally]]
    intervals: dict[str, tuple[float, float]]


def load_run(run: ReportRun) -> LoadedRun:
    """Read a run's files.

    Raises:
        CafeError: a file is missing or damaged.
    """
    try:
        return _load_run(run)
    except FileNotFoundError as error:
        raise CafeError(f"The run {run.name!r} lacks the file {error.filename}.") from None
    except ValueError as error:
        raise CafeError(f"A file of the run {run.name!r} in {run.directory} cannot be read: {error}.") from None


def _load_run(run: ReportRun) -> LoadedRun:
    """Read a run's files; errors are those of the readers."""
    embeddings = read_embeddings(run.directory / "embeddings.npz")
    if not _can_be_mapped(embeddings):
        logger.warning("The embeddings of the run %r are not finite, or of one kind alone: no map is drawn.", run.name)
        embeddings = {}
    results = read_results(run.directory / "results.json")
    samples = read_samples(run.directory / "samples.json")
    log = read_log(run.log) if run.log else []
    # A result without a value, such as one that is not a number, has no interval either.
    tallies = {name: parts for name, parts in _load_tallies(run.directory).items() if name in results}
    intervals = {name: bootstrap_interval(parts) for name, parts in tallies.items()}
    return LoadedRun(run.name, results, samples, embeddings, log, tallies, intervals)


def _can_be_mapped(embeddings: dict[str, np.ndarray]) -> bool:
    """Tell whether embeddings of images and texts can be drawn on two axes, or there are none to draw."""
    if "images" not in embeddings:
        return True
    images, texts = embeddings["images"], embeddings.get("texts", np.zeros(0))
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        return False
    is_large_enough = len(images) > 0 and len(texts) > 0 and images.shape[1] > 1
    return bool(is_large_enough and np.isfinite(images).all() and np.isfinite(texts).all())


def _load_tallies(directory: Path) -> dict[str, list[SampleTally]]:
    """Tally the outputs of a directory, and its means by the tallies of their parts."""
    # A result of its own has one tally, a mean those of all its parts.
    tallies: dict[str, list[SampleTally]] = {}
    for path in sorted((directory / "outputs").glob("*.jsonl")):
        for name, tally in tally_results(read_outputs(path)).items():
            tallies[name] = [tally]
    # A mean has no marks of its own: it is resampled as the mean of its parts, which may be means themselves.
    for name, parts in read_means(directory / "means.json").items():
        if parts and tallies.keys() >= set(parts):
            tallies[name] = list(chain.from_iterable(tallies[part] for part in parts))
    return tallies
