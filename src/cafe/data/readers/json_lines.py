"""JSON lines: one record a line, read where it lies."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from cafe.data.files import file_errors, is_url, read
from cafe.errors import CafeError


class JsonLines:
    """JSON lines. A local file's are looked up where they lie; one from an object store is held."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cached = read(name) if is_url(name) else None
        starts, at = [], 0
        with file_errors(name):
            for line in self.cached.splitlines(keepends=True) if self.cached is not None else _lines(name):
                if line.strip():
                    starts.append((at, at + len(line)))
                at += len(line)
        self.places = np.array(starts, np.int64).reshape(-1, 2)
        self.chunks = [len(starts)]

    def __getitem__(self, index: int) -> Any:
        start, stop = self.places[index].tolist()
        line = self.cached[start:stop] if self.cached is not None else read(self.name, start, stop)
        try:
            return json.loads(line)
        except ValueError as error:
            raise CafeError(f"the line is not valid JSON: {error}.") from None


def _lines(name: str) -> Iterator[bytes]:
    with open(name, "rb") as file:
        yield from file
