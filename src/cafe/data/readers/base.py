"""The rows of a file, whatever kind of file it is: how many, and any of them when asked for.

A row is a mapping of names to values. Nothing but an index is held of what may be large (JSON lines, parquet, tar): a
row is read where it is needed, in a worker. `chunks` says how many rows in a run are read best together.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from cafe.data.files import read
from cafe.data.readers.json_lines import JsonLines
from cafe.data.readers.parquet import Parquet
from cafe.data.readers.tar import Tar
from cafe.errors import CafeError

KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".tar")


class Rows(Protocol):
    """The rows of one file.

    Attributes:
        name: the file's.
        chunks: the lengths of runs of rows that are read best together.
    """

    @property
    def name(self) -> str: ...

    @property
    def chunks(self) -> Sequence[int]: ...

    def __getitem__(self, index: int) -> Any:
        """A row.

        Raises:
            CafeError: it is damaged.
        """


def open_rows(name: str, kept: int) -> Rows:
    """Opens a file by its kind.

    Args:
        name: a path or URL.
        kept: how many chunks to hold in memory.

    Raises:
        CafeError: it is missing, damaged or of no known kind.
    """
    kind = Path(name).suffix.lower()
    if kind not in KINDS:
        raise CafeError(f"The data file {name} is of no kind that is read: {', '.join(KINDS)}.")
    if kind in (".jsonl", ".ndjson"):
        return JsonLines(name)
    if kind == ".parquet":
        return Parquet(name, kept)
    if kind == ".tar":
        return Tar(name)
    if kind == ".json":
        return InMemoryRows(name, load_json(name))
    csv.field_size_limit(2**31 - 1)  # a cell may hold a picture in base64
    text = io.StringIO(_text(name, read(name)), newline="")
    return InMemoryRows(name, list(csv.DictReader(text, delimiter="\t" if kind == ".tsv" else ",")))


def load_json(name: str) -> Any:
    """What a JSON file holds.

    Raises:
        CafeError: it is missing or not JSON.
    """
    try:
        return json.loads(read(name))
    except ValueError as error:
        raise CafeError(f"The data file {name} is not valid JSON: {error}.") from None


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")  # spreadsheets write a mark before the first column's name
    except UnicodeDecodeError as error:
        raise CafeError(f"The data file {name} is not UTF-8 text: {error}.") from None


class InMemoryRows:
    """Rows that are in memory."""

    def __init__(self, name: str, rows: Any) -> None:
        if not isinstance(rows, list):
            raise CafeError(f"The data file {name} is not a list of records.")
        self.name, self.rows, self.chunks = name, rows, [len(rows)]

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class UnreadableFile:
    """Stands for a file that cannot be read, beside others that can: so many rows, and all of them damaged."""

    def __init__(self, name: str, reason: str, rows: int) -> None:
        self.name, self.reason, self.chunks = name, reason, [rows]

    def __getitem__(self, index: int) -> Any:
        raise CafeError(self.reason)
