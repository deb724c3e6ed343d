"""The files that suites share: finding them, reading records from them, and asking about the images they name."""

import json
import os.path
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cafe.content import Content, ImageRef
from cafe.errors import CafeError, RecordError
from cafe.evaluation.cached_model import CachedModel

NUM_SAMPLES = 12  # samples of each kind in the report

# The fields that each record of a file must have, with their types.
Fields = Mapping[str, type | tuple[type, ...]]


def by_pattern(*patterns: str) -> Callable[[Path], list[Path]]:
    """Make a `Suite.find_files` that finds at most one file per pattern."""

    def find_files(data: Path) -> list[Path]:
        candidates = [find_one(data, pattern) for pattern in patterns]
        return [path for path in candidates if path]

    return find_files


def find_one(data: Path, *patterns: str, exclude: Sequence[str] = ()) -> Path | None:
    """Find the one file in a folder that matches any of the patterns; None if there is none.

    Args:
        data: the folder.
        patterns: glob patterns.
        exclude: names to ignore.

    Raises:
        CafeError: two files match.
    """
    matches = {path for pattern in patterns for path in data.glob(pattern) if path.name not in exclude}
    if len(matches) > 1:
        names = " and ".join(str(path.relative_to(data)) for path in sorted(matches))
        raise CafeError(f"{names} in {data} measure the same: keep only one of them in the folder.")
    return matches.pop() if matches else None


def json_lines(path: Path, fields: Fields) -> list[dict[str, Any]]:
    """Read the records of a JSON lines file, each of which must have the fields."""
    try:
        # `splitlines` would also split at characters that may occur inside a string, such as U+2028.
        rows = [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
    except ValueError as error:
        raise CafeError(f"The evaluation file {path} is not valid JSON lines: {error}.") from None
    return _require_fields(path, rows, fields)


def json_records(path: Path, fields: Fields) -> list[dict[str, Any]]:
    """Read the records of a JSON file, a list or an object of them by number; fields that are null count as missing."""
    try:
        rows = json.loads(path.read_text(), object_pairs_hook=_without_nulls)
    except ValueError as error:
        raise CafeError(f"The evaluation file {path} is not valid JSON: {error}.") from None
    if isinstance(rows, dict):
        rows = list(rows.values())
    return _require_fields(path, rows, fields)


def _without_nulls(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if value is not None}


def _require_fields(path: Path, rows: Any, fields: Fields) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not rows:
        raise CafeError(f"The evaluation file {path} is empty.")
    for number, row in enumerate(rows, 1):
        for name, kind in fields.items():
            if not isinstance(row, dict) or name not in row:
                raise RecordError(f"The evaluation file {path} lacks the field {name!r} in record {number}.")
            value, wanted = row[name], _kind_name(kind)
            if not isinstance(value, kind):
                raise RecordError(
                    f"The field {name!r} in record {number} of the evaluation file {path} should be {wanted}, "
                    f"not {value!r:.40}."
                )
    return rows


def _kind_name(kind: type | tuple[type, ...]) -> str:
    if kind is str:
        return "text"
    return "a list" if kind is list else "a number"


def parquet_rows(
    parts: Sequence[Path], path: Path, columns: Iterable[str], limit: int | None = None
) -> list[dict[str, Any]]:
    """Read the rows of parquet files, which must have the columns.

    Args:
        parts: the files.
        path: the dataset they belong to, for messages.
        columns: the columns that must be there; all columns are read.
        limit: maximum number of rows per file.
    """
    rows: list[dict[str, Any]] = []
    required = list(columns)
    for part in parts:
        try:
            table = pq.read_table(part)
        except (pa.ArrowInvalid, OSError) as error:
            raise CafeError(f"The evaluation file {part} is not valid parquet: {error}.") from None
        for column in required:
            if column not in table.column_names:
                raise CafeError(f"The evaluation file {part} lacks the column {column!r}.")
        rows += table.slice(0, limit).to_pylist()
    if not rows:
        raise CafeError(f"There is no record in {path}.")
    return rows


def find_image(name: str | Path, data: Path, source: Path, *folders: str) -> Path:
    """Find the image that the file `source` names: in `data`, in its `images/`, or in other folders of it.

    Returns:
        the path relative to `data`.

    Raises:
        RecordError: it is in none of them.
    """
    searched = ("", "images", *folders)
    for folder in searched:
        # `Path.is_file` raises for a text that is too long for a file name; this returns False.
        if os.path.isfile(data / folder / name):
            return Path(folder) / name
    places = ", ".join(str(data / folder) for folder in searched)
    raise RecordError(f"The image {name}, which {source} names, is in none of {places}.")


def ask_about_images(
    model: CachedModel, data: Path, source: Path, rows: Sequence[dict[str, Any]], max_new_tokens: int, *folders: str
) -> list[dict[str, Any]]:
    """Ask the "text" of each record of the file `source` about its image.

    Returns:
        for each record, the first fields of its output row: id, image, what was asked and what the model said.

    Raises:
        RecordError: an image is missing.
    """
    # All images are looked up before the model starts: a missing one should not cost an hour.
    images = [find_image(row["image"], data, source, *folders) for row in rows]
    prompts = [Content((ImageRef(data / image), row["text"])) for image, row in zip(images, rows, strict=True)]
    answers = model.generate(prompts, max_new_tokens)
    outputs = []
    for number, (row, image, answer) in enumerate(zip(rows, map(str, images), answers, strict=True)):
        sample = row.get("question_id", number)
        outputs.append({"id": sample, "group": image, "image": image, "asked": row["text"], "said": answer})
    return outputs


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Choose up to `wanted` of the numbers below `count`, evenly spaced."""
    return [int(number) for number in np.linspace(0, count - 1, min(wanted, count))]
