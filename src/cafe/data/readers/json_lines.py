"""JSON lines: an index of where each line begins and ends."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cafe.data.files import file_errors, is_url, read
from cafe.errors import RecordError


class JsonLines:
    """Read JSON lines by an index of byte ranges; a file from an object store is kept in memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.content: bytes | None = None
        lines: Iterable[bytes]
        if is_url(name):
            # Otherwise each line would be a request of its own.
            self.content = read(name)
            lines = self.content.splitlines(keepends=True)
        else:
            lines = _local_lines(name)
        with file_errors(name):
            ranges = list(_byte_ranges(lines))
        # An array: a list of pairs would take several times the memory, in each worker again.
        self.ranges = np.array(ranges, np.int64).reshape(-1, 2)
        self.chunks = [len(ranges)]

    def __getitem__(self, index: int) -> Any:
        start, stop = self.ranges[index].tolist()
        line = read(self.name, start, stop) if self.content is None else self.content[start:stop]
        try:
            return json.loads(line)
        except ValueError as error:
            raise RecordError(f"the line is not valid JSON: {error}.") from None
        except RecursionError:
            raise RecordError("the line is nested too deeply to be read.") from None


def _byte_ranges(lines: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    """Yield where each line begins and ends, without empty ones."""
    start = 0
    for line in lines:
        stop = start + len(line)
        if line.strip():
            yield start, stop
        start = stop


def _local_lines(name: str) -> Iterator[bytes]:
    """Yield a local file's lines; it is opened when the first one is asked for."""
    with open(name, "rb") as file:
        yield from file
