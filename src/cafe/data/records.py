"""Sources opened: files of records that become Examples one at a time, when asked.

A file's kind (JSON, JSON lines, CSV, parquet, tar, a dataset) says how its rows are read, the source's format says what
a row means; any format may lie in any kind of file. Only an index is read here; pictures stay references. A record that
cannot become an Example raises `CafeError` with the file and the record named.
"""

import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from cafe.content import Dialogue, Example, Pair
from cafe.data.files import expand_pattern, folder_of, is_url
from cafe.data.formats.karpathy import karpathy, split_of
from cafe.data.formats.llava import llava
from cafe.data.formats.mmeb import mmeb
from cafe.data.formats.pairs import pairs
from cafe.data.readers.base import InMemoryRows, Rows, UnreadableFile, load_json, open_rows
from cafe.data.readers.hf_datasets import HFDataset
from cafe.data.source import Columns, Format, Source
from cafe.errors import CafeError

__all__ = ["Columns", "OpenedSource", "Source", "open_source"]

logger = logging.getLogger(__name__)

RecordParser = Callable[[Any, Source, Random], tuple[Pair | None, Dialogue | None]]
FORMATS: dict[Format, RecordParser] = {"llava": llava, "karpathy": karpathy, "mmeb": mmeb, "pairs": pairs}


@dataclass(frozen=True)
class OpenedSource:
    """An opened source: how many records there are, and how to make an Example of one.

    `example(index, rng)` uses the random numbers for choices, such as which of five captions to take.
    """

    source: Source
    files: Sequence[Rows]

    @cached_property
    def ends(self) -> list[int]:
        """For each file, the number of records up to its end."""
        return list(accumulate(sum(file.chunks) for file in self.files))

    @cached_property
    def sources(self) -> list[Source]:
        """For each file the source, with the folder that image paths are relative to: by default the file's own."""
        own = (folder_of(file.name) for file in self.files)
        return [self.source if self.source.images else replace(self.source, images=folder) for folder in own]

    @cached_property
    def chunks(self) -> list[int]:
        """The lengths of runs of records that are read best together."""
        return [length for file in self.files for length in file.chunks]

    def __len__(self) -> int:
        return self.ends[-1]

    def example(self, index: int, rng: Random) -> Example:
        """Record number `index` as an Example.

        Raises:
            CafeError: the record is bad.
        """
        number = bisect_right(self.ends, index)
        file = self.files[number]
        within = index - (self.ends[number - 1] if number else 0)
        name = f"{file.name}, record {within}"
        try:
            row = file[within]
            if isinstance(row, dict):
                name += next((f" (id {row[key]})" for key in ("id", "__key__") if key in row), "")
            pair, dialogue = FORMATS[self.source.format](row, self.sources[number], rng)
            if not self.source.use_pairs:
                pair = None
                if dialogue is None:
                    raise CafeError("there is no dialogue, and the source's pairs are not taken (contrast: false).")
        except CafeError as error:
            raise CafeError(f"{name}: {error}") from None
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise CafeError(f"{name}: a field is missing or of the wrong kind ({error}).") from None
        return Example(pair, dialogue, name)


def open_source(source: Source) -> OpenedSource:
    """Finds a source's files and what is in them.

    One file of several that cannot be read is warned of, and its rows, as many as the others have on average, count as
    bad: so that a run with too many such files stops.

    Raises:
        CafeError: no file can be read, or a file is not of the format.
    """
    if not source.path:
        raise CafeError("A source's path is empty.")
    if source.path.startswith("dataset:") or (not is_url(source.path) and Path(source.path).is_dir()):
        return _counted(OpenedSource(source, [HFDataset(source.path, source.split, source.subset)]))
    names = expand_pattern(source.path)
    if source.format == "karpathy" and source.path.endswith(".json"):
        return _counted(OpenedSource(source, [_karpathy(name, source.split) for name in names]))
    read: dict[str, Rows] = {}
    lost: dict[str, str] = {}
    for name in tqdm(names, desc=f"index {source.path}", unit="file", disable=len(names) < 8, leave=False):
        try:
            read[name] = open_rows(name, source.shuffle_window)
        except CafeError as error:
            if len(names) == 1:
                raise
            lost[name] = str(error)
            logger.warning("%s Its records count as bad.", error)
    if not read:
        raise CafeError(f"None of the {len(names)} files of {source.path} can be read. The last: {lost[names[-1]]}")
    mean = max(1, round(sum(sum(file.chunks) for file in read.values()) / len(read)))
    return _counted(
        OpenedSource(source, [read[name] if name in read else UnreadableFile(name, lost[name], mean) for name in names])
    )


def _counted(records: OpenedSource) -> OpenedSource:
    if not len(records):
        raise CafeError(f"The data file {records.source.path} holds no records.")
    return records


def _karpathy(name: str, split: str) -> Rows:
    data = load_json(name)
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list) or not all(isinstance(row, dict) for row in images):
        raise CafeError(f'The data file {name} has no list "images" of records, as a Karpathy split file has.')
    return InMemoryRows(name, split_of(images, split))
