"""What a suite is, what it gives, and the reading of files that suites share."""

import json
import os.path
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cafe.content import Content, ImageRef
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel

NUM_SAMPLES = 12  # samples of each sort, for the report

Fields = Mapping[str, type | tuple[type, ...]]  # what each record of a file must have, and of which kind


@dataclass
class EvaluationResult:
    """What was measured.

    Attributes:
        results: the flat `suite/part/metric` numbers; rates in percent.
        outputs: for each part, a row a sample: what was asked and said. A row's "marks" name the results it counts
            for: `{"pope/random/accuracy": 1}`, or `[numerator, denominator]` where the denominator is not 1. A result
            with marks is the sum of the numerators over the sum of the denominators (`aggregate`): that is what the report
            resamples. "id" pairs the rows of two checkpoints; rows of one "group" (a picture) are resampled together.
        samples: some of these to look at, and what the report draws.
        embeddings: some embeddings by side, for the report's map.
        about: what was evaluated: the data, the limit, the model's fingerprint.
        files: JSON for other people's programs, by the name of the file to write.
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
        """Takes in what another suite measured. Of samples and embeddings, the first of a name stay."""
        self.results |= other.results
        self.outputs |= other.outputs
        self.files |= other.files
        self.means |= other.means
        self.samples = other.samples | self.samples
        self.embeddings = other.embeddings | self.embeddings


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One thing that is measured.

    Attributes:
        name: what `--suite` takes, and the first word of the suite's results.
        measures: what it measures, in half a sentence.
        files: the files it expects under the folder of evaluation files, with what they are.
        download: where the files are had.
        sources: the published protocol.
        find_files: its files under a folder; empty where they are not there. It raises `CafeError` where two of them measure
            the same.
        run: measures a model on the files under a folder, on the first `limit` records of each.
        default: it runs where no suite is named; the others are long, and wait to be named.
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
    lower_is_better: tuple[str, ...] = ()
    no_direction: tuple[str, ...] = ()


def aggregate(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Each result that the rows bear marks for, in percent; 0 where nothing counts."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        for name, mark in row["marks"].items():
            part, whole = mark if isinstance(mark, (list, tuple)) else (mark, 1)
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += part
            total[1] += whole
    return {name: 100 * part / whole if whole else 0.0 for name, (part, whole) in sums.items()}


def mean_of(done: EvaluationResult, name: str, of: Sequence[str]) -> None:
    """Adds a result that is the plain mean of others."""
    done.results[name] = sum(done.results[each] for each in of) / len(of)
    done.means[name] = list(of)


def by_pattern(*patterns: str) -> Callable[[Path], list[Path]]:
    """A `Suite.find`: the files that match, pattern by pattern. Two files that match one pattern are refused."""

    def find(data: Path) -> list[Path]:
        return [path for pattern in patterns if (path := find_one(data, pattern))]

    return find


def find_one(data: Path, *patterns: str, but: Sequence[str] = ()) -> Path | None:
    """The one file under a folder that matches a pattern; none where there is none.

    Raises:
        CafeError: there are two.
    """
    found = sorted({path for pattern in patterns for path in data.glob(pattern) if path.name not in but})
    if len(found) > 1:
        names = " and ".join(str(path.relative_to(data)) for path in found)
        raise CafeError(f"{names} in {data} measure the same: keep one of them in a folder.")
    return found[0] if found else None


def json_lines(path: Path, fields: Fields) -> list[dict[str, Any]]:
    """The records of a JSON lines file, each of which must have the fields."""
    try:
        # Not `splitlines`, which also cuts at marks that may stand inside a text, such as U+2028.
        rows = [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
    except ValueError as error:
        raise CafeError(f"The evaluation file {path} is not valid JSON lines: {error}.") from None
    return _complete(path, rows, fields)


def json_records(path: Path, fields: Fields) -> list[dict[str, Any]]:
    """The records of a JSON file, a list or an object of them by number, which must have every field, not null."""
    try:
        rows = json.loads(path.read_text(), object_pairs_hook=lambda row: {k: v for k, v in row if v is not None})
    except ValueError as error:
        raise CafeError(f"The evaluation file {path} is not valid JSON: {error}.") from None
    return _complete(path, list(rows.values()) if isinstance(rows, dict) else rows, fields)


def _complete(path: Path, rows: Any, fields: Fields) -> list[dict[str, Any]]:
    if not rows or not isinstance(rows, list):
        raise CafeError(f"The evaluation file {path} is empty.")
    for number, row in enumerate(rows, 1):
        for name, kind in fields.items():
            if not isinstance(row, dict) or name not in row:
                raise CafeError(f"The evaluation file {path} lacks the field {name!r} in record {number}.")
            if not isinstance(row[name], kind):
                wanted = "text" if kind is str else "a list" if kind is list else "a number"
                raise CafeError(
                    f"The field {name!r} in record {number} of the evaluation file {path} should be {wanted}, "
                    f"not {row[name]!r:.40}."
                )
    return rows


def parquet_rows(
    parts: Sequence[Path], path: Path, columns: Iterable[str], limit: int | None = None
) -> list[dict[str, Any]]:
    """The rows of the parquet files of `path`, the first `limit` of each; the files must have the columns."""
    rows: list[dict[str, Any]] = []
    for part in parts:
        try:
            table = pq.read_table(part)
        except (pa.ArrowInvalid, OSError) as error:
            raise CafeError(f"The evaluation file {part} is not valid parquet: {error}.") from None
        for column in columns:
            if column not in table.column_names:
                raise CafeError(f"The evaluation file {part} lacks the column {column!r}.")
        rows += table.slice(0, limit).to_pylist()
    if not rows:
        raise CafeError(f"There is no record in {path}.")
    return rows


def find_image(name: str | Path, data: Path, source: Path, *folders: str) -> Path:
    """Where a picture that the file `source` names is, relative to `data`: there, in `images/`, or in other folders.

    Raises:
        CafeError: it is in none of them.
    """
    for folder in ("", "images", *folders):
        if os.path.isfile(data / folder / name):  # not Path's, which raises where a text is too long for a name
            return Path(folder) / name
    places = ", ".join(str(data / folder) for folder in ("", "images", *folders))
    raise CafeError(f"The picture {name}, which {source} names, is in none of {places}.")


def ask_about_images(
    model: CachedModel, data: Path, source: Path, rows: Sequence[dict[str, Any]], longest: int, *folders: str
) -> list[dict[str, Any]]:
    """Asks the "text" of each record of the file `source` about its picture.

    Returns:
        for each record, how its output row begins: its id and picture, what was asked and what was said.

    Raises:
        CafeError: a picture is not there.
    """
    pictures = [find_image(row["image"], data, source, *folders) for row in rows]
    shown = zip(pictures, rows, strict=True)
    said = model.generate([Content((ImageRef(data / at), row["text"])) for at, row in shown], longest)
    return [
        {"id": row.get("question_id", number), "group": str(at), "image": str(at), "asked": row["text"], "said": text}
        for number, (row, at, text) in enumerate(zip(rows, pictures, said, strict=True))
    ]


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of `count` numbers, evenly spread."""
    return [int(number) for number in np.linspace(0, count - 1, min(wanted, count))]
