"""The rows of a file of any kind: how many there are, and any of them on demand.

A row is a mapping of names to values. Of files that may be large (JSON lines, parquet, tar) only an index is kept in
memory; a row is read where it is needed, in a worker.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from cafe.content import ImageLimits
from cafe.data.files import read
from cafe.data.readers.delimited import DelimitedRows
from cafe.data.readers.json_lines import JsonLines
from cafe.data.readers.parquet import Parquet
from cafe.data.readers.tar import Tar
from cafe.errors import CafeError, RecordError

MAX_SNIFFED = 2**20  # bytes at the beginning of a file that may tell its kind
KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".tar")


class Rows(Protocol):
    """The rows of one file."""

    @property
    def name(self) -> str:
        """Return the file's name."""

    @property
    def chunks(self) -> Sequence[int]:
        """Return the lengths of runs of rows that are best read together."""

    def __getitem__(self, index: int) -> Any:
        """Read a row.

        Raises:
            RecordError: the row is damaged.
            CafeError: the file cannot be read.
        """


def open_rows(name: str, max_cached: int, max_bytes: int = ImageLimits.max_bytes) -> Rows:
    """Open a file by its kind.

    Args:
        name: a path or URL.
        max_cached: the number of chunks to keep in memory.
        max_bytes: the most bytes of a tar's row.

    Raises:
        CafeError: it is missing, damaged or of unknown kind.
    """
    match Path(name).suffix.lower():
        case ".jsonl" | ".ndjson":
            return JsonLines(name)
        case ".parquet":
            return Parquet(name, max_cached)
        case ".tar":
            return Tar(name, max_bytes)
        case ".json":
            return InMemoryRows(name, load_json(name))
        case ".csv":
            return DelimitedRows(name, ",")
        case ".tsv":
            return DelimitedRows(name, "\t")
    raise CafeError(f"The data file {name} is of no kind that is read: {', '.join(KINDS)}.")


def load_json(name: str) -> Any:
    """Load a JSON file.

    Raises:
        CafeError: it is missing, not JSON, or nested too deeply.
    """
    data = read(name)
    try:
        return json.loads(data)
    except ValueError as error:
        if holds_json_lines(data):
            raise CafeError(
                f"The data file {name} holds a JSON value on each line: give it a name that ends in .jsonl."
            ) from None
        raise CafeError(f"The data file {name} is not valid JSON: {error}.") from None
    except RecursionError:
        raise CafeError(f"The data file {name} is nested too deeply to be read.") from None


def holds_json_lines(data: bytes) -> bool:
    """Return whether the first two lines that are not empty are a JSON value each."""
    lines = list(filter(bytes.strip, data[:MAX_SNIFFED].splitlines()))
    try:
        return len(list(map(json.loads, lines[:2]))) == 2
    except (ValueError, RecursionError):
        return False


class InMemoryRows:
    """Hold rows in memory.

    Raises:
        CafeError: they are not a list.
    """

    def __init__(self, name: str, rows: Any) -> None:
        if not isinstance(rows, list):
            raise CafeError(f"The data file {name} is not a list of records.")
        self.name, self.rows, self.chunks = name, rows, [len(rows)]

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


# Among files that can be read, in the place of one that cannot: see `open_source`.
class UnreadableFile:
    """Stand for a file that cannot be read, among others that can: so many rows, all of them bad."""

    def __init__(self, name: str, reason: str, num_rows: int) -> None:
        self.name, self.reason, self.chunks = name, reason, [num_rows]

    def __getitem__(self, index: int) -> Any:
        raise RecordError(self.reason)
