"""Parquet files, read by row groups."""

from collections import OrderedDict
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cafe.data.files import file_errors


class Parquet:
    """Read a parquet file. A row group is the least that can be read; the last used ones are cached."""

    def __init__(self, name: str, max_cached: int) -> None:
        self.name, self.max_cached = name, max_cached
        # The file is opened anew for each row group: a worker must not share its parent's handle.
        with file_errors(name), fsspec.open(name) as file:
            metadata = pq.ParquetFile(file).metadata
        self.chunks = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self.ends = np.cumsum(self.chunks)
        self.cached: OrderedDict[int, pa.Table] = OrderedDict()

    def __getitem__(self, index: int) -> Any:
        number = int(np.searchsorted(self.ends, index, side="right"))
        start = int(self.ends[number]) - self.chunks[number]
        within = index - start
        # To Python objects only now, one row of the group: a whole one would take much more memory than the table.
        with file_errors(self.name):
            return self._row_group(number).slice(within, 1).to_pylist()[0]

    def _row_group(self, number: int) -> pa.Table:
        """Return a row group, from the cache or from the file."""
        if number not in self.cached:
            with file_errors(self.name), fsspec.open(self.name) as file:
                self.cached[number] = pq.ParquetFile(file).read_row_group(number)
            # Least recently used goes first: the order of training stays within a window of row groups.
            if len(self.cached) > self.max_cached:
                self.cached.popitem(last=False)
        self.cached.move_to_end(number)
        return self.cached[number]
