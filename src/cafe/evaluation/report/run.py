"""Read what `cafe evaluate` and a training run wrote about a checkpoint."""

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from cafe.errors import CafeError
from cafe.evaluation.report.significance import SampleTally, bootstrap_interval, tally_results


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
    except (ValueError, EOFError, BadZipFile) as error:  # NumPy raises the last two for a truncated embeddings.npz
        raise CafeError(f"A file of the run {run.name!r} in {run.directory} cannot be read: {error}.") from None


def _load_run(run: ReportRun) -> LoadedRun:
    """Read a run's files; errors are those of the readers."""
    # NumPy reads the arrays when they are asked for, so they are copied before the file is closed.
    with np.load(run.directory / "embeddings.npz") as arrays:
        embeddings = dict(arrays)
    results = json.loads((run.directory / "results.json").read_text())
    samples = json.loads((run.directory / "samples.json").read_text())
    log = _read_json_lines(run.log) if run.log else []
    tallies = _load_tallies(run.directory)
    intervals = {name: bootstrap_interval(parts) for name, parts in tallies.items()}
    return LoadedRun(run.name, results, samples, embeddings, log, tallies, intervals)


def _load_tallies(directory: Path) -> dict[str, list[SampleTally]]:
    """Tally the outputs of a directory, and its means by the tallies of their parts."""
    # A result of its own has one tally, a mean those of all its parts.
    tallies: dict[str, list[SampleTally]] = {}
    for path in sorted((directory / "outputs").glob("*.jsonl")):
        for name, tally in tally_results(_read_json_lines(path)).items():
            tallies[name] = [tally]
    # A mean has no marks of its own: it is resampled as the mean of its parts, which may be means themselves.
    for name, parts in _read_means(directory / "means.json").items():
        if tallies.keys() >= set(parts):
            tallies[name] = list(chain.from_iterable(tallies[part] for part in parts))
    return tallies


def _read_means(path: Path) -> dict[str, list[str]]:
    """Read which results are means of which; a directory need not have that file."""
    if not path.is_file():
        return {}
    means: dict[str, list[str]] = json.loads(path.read_text())
    return means


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with a JSON object on each line."""
    return [json.loads(line) for line in path.read_text().splitlines()]
