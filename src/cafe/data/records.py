"""Open sources: files of records that become Examples one at a time, on demand.

A file's kind (JSON, JSON lines, CSV, parquet, tar, a dataset) determines how its rows are read; the source's format
determines what a row means. Any format may be stored in any kind of file. Only an index is read here, and images stay
references. A record that cannot become an Example raises `RecordError`, which names the file and the record.
"""

import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from cafe.content import DEFAULT_LIMITS, Dialogue, Example, ImageLimits, Pair
from cafe.data.files import expand_pattern, folder_of, is_url
from cafe.data.formats.karpathy import karpathy, select_split
from cafe.data.formats.llava import llava
from cafe.data.formats.mmeb import mmeb
from cafe.data.formats.pairs import pairs
from cafe.data.readers.base import InMemoryRows, Rows, UnreadableFile, load_json, open_rows
from cafe.data.readers.hf_datasets import HFDataset, image_folder
from cafe.data.source import Columns, Format, Source
from cafe.errors import CafeError, RecipeError, RecordError
from cafe.utils.text import escape_controls

__all__ = ["Columns", "OpenedSource", "Source", "open_source"]

logger = logging.getLogger(__name__)

# A row, its source and a generator for choices within it -> what the row holds. Raises RecordError for a bad one.
RecordParser = Callable[[Any, Source, Random], tuple[Pair | None, Dialogue | None]]
FORMATS: dict[Format, RecordParser] = {"llava": llava, "karpathy": karpathy, "mmeb": mmeb, "pairs": pairs}
MIN_FILES_FOR_PROGRESS_BAR = 8
# The columns that a format reads, where it does not read all.
READ_COLUMNS: dict[Format, tuple[str, ...]] = {
    "llava": ("image", "conversations", "negatives", "negative_scores"),
    "karpathy": (),
    "mmeb": (),
}


@dataclass(frozen=True)
class OpenedSource:
    """Hold the open files of a source: how many records there are, and an Example of any of them."""

    source: Source
    files: Sequence[Rows]

    @cached_property
    def starts(self) -> list[int]:
        """Return for each file the number of records before it, and at the end the number of all."""
        sizes = (sum(file.chunks) for file in self.files)
        return list(accumulate(sizes, initial=0))

    @cached_property
    def sources(self) -> list[Source]:
        """Return for each file the source with the folder of its images, by default the file's own."""
        # A pattern may match files in several folders, each with its images beside it.
        return [replace(self.source, path=file.name, images=self._folder(file)) for file in self.files]

    @cached_property
    def chunks(self) -> list[int]:
        """Return the lengths of runs of records that are best read together."""
        return list(chain.from_iterable(file.chunks for file in self.files))

    def _folder(self, file: Rows) -> str:
        """Return the folder of the images that a file's records name."""
        if self.source.images:
            return self.source.images
        return image_folder(file.name) if isinstance(file, HFDataset) else folder_of(file.name)

    def __len__(self) -> int:
        """Return the number of records."""
        return self.starts[-1]

    def field_names(self) -> list[str]:
        """Return the names of the fields of the first record; none if it cannot be read."""
        with suppress(CafeError):
            row = self.files[0][0]
            if isinstance(row, dict):
                return list(map(str, row))
        return []

    def row(self, index: int) -> tuple[Any, Source]:
        """Read a record as it is stored, and return it with the source of its file.

        Raises:
            CafeError: its file cannot be read.
        """
        file_number, row_number = self._locate(index)
        return self.files[file_number][row_number], self.sources[file_number]

    def _locate(self, index: int) -> tuple[int, int]:
        """Return which file a record is in, and which of its rows."""
        file_number = bisect_right(self.starts, index) - 1
        return file_number, index - self.starts[file_number]

    def example(self, index: int, rng: Random) -> Example:
        """Read a record and make an Example of it.

        Args:
            index: the record's number in the source.
            rng: for choices within the record, such as which of five captions to take.

        Raises:
            RecordError: the record is bad.
        """
        file_number, row_number = self._locate(index)
        file = self.files[file_number]
        origin = f"{file.name}, record {row_number}"
        try:
            row = file[row_number]
            origin += _id_suffix(row)
            pair, dialogue = _parse_row(row, self.sources[file_number], rng)
        except CafeError as error:
            # Also where the row's file or its image on an object store cannot be read: other records may be fine.
            raise RecordError(escape_controls(f"{origin}: {error}")) from None
        # The parsers take for granted that fields are there and of the right type, which keeps them short.
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
            reason = escape_controls(str(error))
            raise RecordError(f"{origin}: a field is missing or of the wrong kind ({reason}).") from None
        except RecursionError:
            raise RecordError(f"{origin}: a field is nested too deeply to be read.") from None
        return Example(pair, dialogue, origin)


def _parse_row(row: Any, source: Source, rng: Random) -> tuple[Pair | None, Dialogue | None]:
    """Parse a row by its source's format; the pair is dropped where the source's pairs are not used.

    Raises:
        RecordError: the format's parser raises it, or nothing is left of the record.
    """
    pair, dialogue = FORMATS[source.format](row, source, rng)
    if source.use_pairs:
        return pair, dialogue
    if dialogue is None:
        raise RecordError("there is no dialogue, and the source's pairs are not used (use_pairs: false).")
    return None, dialogue


def _id_suffix(row: Any) -> str:
    """Return the name that a record has in its file, for messages."""
    if not isinstance(row, dict):
        return ""
    for key in ("id", "__key__"):  # the second is a tar's
        if key in row:
            return escape_controls(f" (id {row[key]!s:.100})")
    return ""


def open_source(source: Source, limits: ImageLimits = DEFAULT_LIMITS) -> OpenedSource:
    """Find a source's files and index them.

    If one file of several cannot be read, a warning is logged and its rows, as many as the others have on average,
    count as bad records, so that a run with too many such files stops.

    Args:
        source: the source.
        limits: the limits on its images, where it has none of its own.

    Raises:
        CafeError: no file can be read, or a file does not have the source's format.
    """
    if not source.path:
        raise RecipeError("A source's path is empty.")
    _check_columns(source)
    source = replace(
        source,
        max_image_bytes=source.max_image_bytes or limits.max_bytes,
        max_image_pixels=source.max_image_pixels or limits.max_pixels,
    )
    opened = OpenedSource(source, _open_files(source))
    if not len(opened):
        raise CafeError(f"The data file {source.path} holds no records.")
    return opened


def _check_columns(source: Source) -> None:
    """Make sure that the source's format reads the columns that were renamed.

    Raises:
        RecipeError: it does not, so their values would be left out without a word.
    """
    read = READ_COLUMNS.get(source.format)
    if read is None:
        return
    renamed = [each.name for each in fields(Columns) if getattr(source.columns, each.name) != each.default]
    for name in renamed:
        if name not in read:
            known = f"only {', '.join(read)}" if read else "none"
            raise RecipeError(
                f"The format {source.format} of {source.path} does not read columns.{name}: of columns, it takes "
                f"{known}."
            )


def _open_files(source: Source) -> list[Rows]:
    """Open a source's files: a dataset, Karpathy's split files, or files of rows."""
    if _is_dataset(source.path):
        return [HFDataset(source.path, source.split, source.subset)]
    names = expand_pattern(source.path)
    # The usual form of these files is one object, whose images of other splits are dropped here, not counted as bad.
    is_json = source.path.endswith(".json")
    if is_json and source.format == "karpathy":
        return [_open_karpathy(name, source.split) for name in names]
    if len(names) == 1:
        return [open_rows(names[0], source.shuffle_window, source.image_limits.max_bytes)]
    return _open_several(names, source)


def _is_dataset(path: str) -> bool:
    """Return whether a path is for the datasets library: a folder, or a name after `dataset:`."""
    if path.startswith("dataset:"):
        return True
    return not is_url(path) and Path(path).is_dir()


def _open_several(names: list[str], source: Source) -> list[Rows]:
    """Open files; one that cannot be read is replaced by as many bad records as the others hold on average."""
    files: dict[str, Rows] = {}
    errors: dict[str, str] = {}
    quiet = len(names) < MIN_FILES_FOR_PROGRESS_BAR
    for name in tqdm(names, desc=f"index {source.path}", unit="file", disable=quiet, leave=False):
        try:
            files[name] = open_rows(name, source.shuffle_window, source.image_limits.max_bytes)
        except CafeError as error:
            errors[name] = str(error)
            logger.warning("%s Its records count as bad.", escape_controls(str(error)))
    if not files:
        raise CafeError(f"None of the {len(names)} files of {source.path} can be read. The last: {errors[names[-1]]}")

    # A file that cannot be read counts as bad records, in its place, so that the order of the others stays.
    num_rows = [sum(file.chunks) for file in files.values()]
    mean = max(1, round(sum(num_rows) / len(num_rows)))
    for name, reason in errors.items():
        files[name] = UnreadableFile(name, reason, mean)
    return [files[name] for name in names]


def _open_karpathy(name: str, split: str) -> Rows:
    """Open a split file, whose records are a list within one object.

    Raises:
        CafeError: it cannot be read or holds no such list.
    """
    # The file is read whole: its records are a part of one JSON value.
    data = load_json(name)
    match data:
        case {"images": list(images)} if all(isinstance(row, dict) for row in images):
            return InMemoryRows(name, select_split(images, split))
    raise CafeError(f'The data file {name} has no list "images" of records, as a Karpathy split file has.')
