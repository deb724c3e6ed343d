"""The files that suites share: finding them, reading records from them, and asking about the images they name."""

import json
import os.path
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cafe.content import Content, ImageRef
from cafe.data.trust import TRUSTED_SUFFIXES
from cafe.errors import CafeError, RecordError
from cafe.evaluation.cached_model import CachedModel
from cafe.images.decoding import decode_image
from cafe.images.thumbnails import thumbnail
from cafe.utils.paths import is_within
from cafe.utils.text import escape_controls, shorten

NUM_SAMPLES = 12  # samples of each kind in the report

# The fields that each record of a file must have, with their types.
Fields = Mapping[str, type | tuple[type, ...]]
KIND_NAMES: dict[Any, str] = {str: "text", list: "a list"}  # for errors; all other types are of numbers


def by_pattern(*patterns: str) -> Callable[[Path], list[Path]]:
    """Make a `Suite.find_files` that finds at most one file per pattern."""

    def find_files(data: Path) -> list[Path]:
        """Find the files in a folder, in the order of the patterns."""
        return list(chain.from_iterable(find_one(data, pattern) for pattern in patterns))

    return find_files


def find_one(data: Path, *patterns: str, exclude: Sequence[str] = ()) -> list[Path]:
    """Find the one file in a folder that matches any of the patterns, or none.

    Args:
        data: the folder.
        patterns: glob patterns.
        exclude: names to ignore.

    Raises:
        CafeError: two files match.
    """
    # A set, because two patterns may match the same file.
    matches: set[Path] = set()
    for pattern in patterns:
        matches.update(path for path in data.glob(pattern) if path.name not in exclude)
    if len(matches) > 1:
        names = " and ".join(str(path.relative_to(data)) for path in sorted(matches))
        raise CafeError(f"{names} in {data} measure the same: keep only one of them in the folder.")
    return list(matches)


def read_text(path: Path, kind: str = "UTF-8 text") -> str:
    """Read a text file in UTF-8, with or without the byte order mark that some editors write.

    Args:
        path: the file.
        kind: what it should be, for the error.

    Raises:
        CafeError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CafeError(f"The evaluation file {path} is not {kind}: {error}.") from None


def load_json(path: Path, kind: str = "valid JSON", **options: Any) -> Any:
    """Load a JSON file.

    Args:
        path: the file.
        kind: what it should be, for the error.
        **options: of `json.loads`.

    Raises:
        CafeError: it is not JSON in UTF-8.
    """
    return _parse_json(read_text(path, kind), path, kind, **options)


def _parse_json(text: str, path: Path, kind: str, **options: Any) -> Any:
    """Parse JSON.

    Args:
        text: the JSON.
        path: its file, for the error.
        kind: what the file should be, for the error.
        **options: of `json.loads`.
    """
    try:
        value = json.loads(text, **options)
        # Half of a surrogate pair, which only an escape can make, can neither be written nor be read by a tokenizer.
        if re.search(r"\\ud[89a-f]", text, re.IGNORECASE):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise CafeError(f"The evaluation file {path} holds half of a surrogate pair, which is no character.") from None
    except RecursionError:
        raise CafeError(f"The evaluation file {path} is nested too deeply to be read.") from None
    except ValueError as error:
        raise CafeError(f"The evaluation file {path} is not {kind}: {error}.") from None
    return value


def json_lines(path: Path, fields: Fields) -> list[dict[str, Any]]:
    """Read the records of a JSON lines file, each of which must have the fields."""
    # `splitlines` would also split at characters that may occur inside a string, such as U+2028.
    lines = filter(str.strip, read_text(path, "valid JSON lines").split("\n"))
    rows = [_parse_json(line, path, "valid JSON lines") for line in lines]
    return require_fields(path, rows, fields)


def json_records(path: Path, fields: Fields) -> list[dict[str, Any]]:
    """Read the records of a JSON file, a list or an object of them by number; fields that are null count as missing."""
    rows = load_json(path, object_pairs_hook=_without_nulls)
    if isinstance(rows, dict):
        rows = list(rows.values())
    return require_fields(path, rows, fields)


def _without_nulls(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object from its pairs, leaving out null values."""
    return {name: value for name, value in pairs if value is not None}


def require_fields(path: Path, rows: Any, fields: Fields) -> list[dict[str, Any]]:
    """Check that a file has records and that each record has the fields; return the records."""
    if not isinstance(rows, list) or not rows:
        raise CafeError(f"The evaluation file {path} is empty.")
    for number, row in enumerate(rows, 1):
        # What is not an object has no field; the error names the first one that it lacks.
        _check_record(path, number, row if isinstance(row, dict) else {}, fields)
        if not isinstance(row, dict):
            raise RecordError(f"Record {number} of the evaluation file {path} is no object with named fields.")
    return rows


def require_texts(path: Path, rows: Sequence[Mapping[str, Any]], *names: str) -> None:
    """Check that lists in some fields hold nothing but texts.

    Args:
        path: the rows' file, for the error.
        rows: the records.
        *names: of the fields, which are lists.

    Raises:
        RecordError: an item is no text.
    """
    for number, row in enumerate(rows, 1):
        for name in names:
            if not all(isinstance(item, str) for item in row[name]):
                raise RecordError(
                    f"The field {name!r} in record {number} of the evaluation file {path} should hold texts alone."
                )


def _check_record(path: Path, number: int, record: Mapping[str, Any], fields: Fields) -> None:
    """Check that a record, counted from 1, has the fields with their types."""
    for name, kind in fields.items():
        if name not in record:
            raise RecordError(f"The evaluation file {path} lacks the field {name!r} in record {number}.")
        if not isinstance(record[name], kind):
            wanted = KIND_NAMES.get(kind, "a number")
            raise RecordError(
                f"The field {name!r} in record {number} of the evaluation file {path} should be {wanted}, "
                f"not {record[name]!r:.40}."
            )


def parquet_rows(
    files: Sequence[Path], path: Path, columns: Iterable[str], limit: int | None = None
) -> list[dict[str, Any]]:
    """Read the rows of parquet files, which must have the columns.

    Args:
        files: the files.
        path: the dataset that they belong to, for the error.
        columns: the columns that must be there; all columns are read.
        limit: maximum number of rows per file.
    """
    rows: list[dict[str, Any]] = []
    required = list(columns)  # an iterator would be empty at the second file
    for file in files:
        table = _read_table(file)
        for column in required:
            if column not in table.column_names:
                raise CafeError(f"The evaluation file {file} lacks the column {column!r}.")
        # Only the first rows are made Python objects: the others may hold large images.
        rows += table.slice(0, limit).to_pylist()
    if not rows:
        raise CafeError(f"There is no record in {path}.")
    return rows


def _read_table(path: Path) -> pa.Table:
    """Read a parquet file; raise `CafeError` if it is damaged."""
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise CafeError(f"The evaluation file {path} is not valid parquet: {error}.") from None


def find_image(name: str | Path, data: Path, source: Path, *folders: str) -> Path:
    """Find an image in the folder of evaluation files, in its `images/`, or in other folders of it.

    Args:
        name: the image's, which may have folders in it.
        data: the folder of evaluation files.
        source: the file that names the image, for the error.
        *folders: the other folders.

    Returns:
        the path relative to `data`.

    Raises:
        RecordError: it is in none of them. Outside of `data`, only what a text file names by an absolute path is
            looked at, as in training data.
    """
    if source.suffix in TRUSTED_SUFFIXES and os.path.isabs(name) and os.path.isfile(name):
        return Path(name)
    searched = ("", "images", *folders)
    for folder in searched:
        # `Path.is_file` raises for a text that is too long for a file name; this returns False.
        if is_inside(data / folder / name, data) and os.path.isfile(data / folder / name):
            return Path(folder) / name
    places = ", ".join(str(data / folder) for folder in searched)
    raise RecordError(f"The image {shorten(escape_controls(str(name)))}, which {source} names, is in none of {places}.")


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path stays in a folder, which an absolute name or `..` may leave; links are the user's own."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def ask_about_images(
    model: CachedModel, data: Path, source: Path, rows: Sequence[dict[str, Any]], max_new_tokens: int, *folders: str
) -> list[dict[str, Any]]:
    """Ask about the image of each record.

    Args:
        model: the model.
        data: the folder of evaluation files.
        source: the file of the records, for the error.
        rows: the records, with the name of the image under "image" and the question under "text".
        max_new_tokens: the length of an answer.
        *folders: where the images may be, besides the usual places.

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
        # VQA and POPE number their questions. Questions about one image are one group for the bootstrap.
        sample_id = row.get("question_id", number)
        outputs.append({"id": sample_id, "group": image, "image": image, "asked": row["text"], "said": answer})
    return outputs


def sample_image(image: str | Path, data: Path) -> str:
    """Name an image for the report, by its path in the folder of evaluation files.

    The report shows no other files: an image that is elsewhere, also through a link, is kept as a thumbnail.
    """
    path = data / image
    if is_within(path, data):
        # A relative name stays valid when the folder is moved.
        return str(path.relative_to(data)) if path.is_relative_to(data) else str(path)
    return thumbnail(decode_image(ImageRef(path)))


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Choose up to `wanted` of the numbers below `count`, evenly spaced."""
    return [int(number) for number in np.linspace(0, count - 1, min(wanted, count))]
