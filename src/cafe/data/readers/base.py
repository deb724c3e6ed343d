"""The rows of a file, whatever kind of file it is: how many, and any of them when asked for.

A row is a mapping of names to values. Nothing but an index is held of what may be large (JSON lines, parquet, tar): a
row is read where it is needed, in a worker. `chunks` says how many rows in a run are read best together.
"""

import csv
import hashlib
import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cafe.data.files import file_errors, file_version, is_url, read
from cafe.data.image_fields import is_image_name
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


class Parquet:
    """A parquet file. A row group is the least that can be read; some are kept."""

    def __init__(self, name: str, max_cached: int) -> None:
        self.name, self.max_cached = name, max_cached
        with file_errors(name), fsspec.open(name) as file:
            metadata = pq.ParquetFile(file).metadata
        self.chunks = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self.ends = np.cumsum(self.chunks)
        self.cached: OrderedDict[int, pa.Table] = OrderedDict()

    def __getitem__(self, index: int) -> Any:
        group = int(np.searchsorted(self.ends, index, side="right"))
        within = index - int(self.ends[group]) + self.chunks[group]
        return self._group(group).slice(within, 1).to_pylist()[0]

    def _group(self, number: int) -> pa.Table:
        if number not in self.cached:
            with file_errors(self.name), fsspec.open(self.name) as file:
                self.cached[number] = pq.ParquetFile(file).read_row_group(number)
            if len(self.cached) > self.max_cached:
                self.cached.popitem(last=False)
        self.cached.move_to_end(number)
        return self.cached[number]


class Tar:
    """A WebDataset tar: files whose names agree up to the first dot are one row.

    A row has the fields of its .json, its text (.txt, .caption) under "positive" and under its own suffix, and all its
    pictures, in the order they lie in, under "image" and "query_image". Its bytes are found by an index that is made at
    first use, by a pass over the file, and kept in the user's cache. A file cut short ends in one damaged row.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.starts, self.damage = _index(name)
        self.chunks = [len(self.starts) - 1 + bool(self.damage)]

    def __getitem__(self, index: int) -> Any:
        if index >= len(self.starts) - 1:
            raise CafeError(f"what follows is lost: {self.damage}.")
        data = read(self.name, int(self.starts[index]), int(self.starts[index + 1]))
        row: dict[str, Any] = {}
        shown: list[bytes] = []
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for member in tar:
                    if _is_member(member):
                        _add_member(row, shown, member.name, tar.extractfile(member).read())  # type: ignore[union-attr]
        except (tarfile.TarError, ValueError) as error:
            raise CafeError(f"the row is damaged: {error}.") from None
        return row | ({"image": shown, "query_image": shown} if shown else {})


def _add_member(row: dict[str, Any], shown: list[bytes], name: str, data: bytes) -> None:
    """Puts a member of a tar into its row."""
    row["__key__"], kind = _parts(name)
    if is_image_name(name):
        shown.append(data)
    elif kind.endswith("json"):
        value = json.loads(data)
        row.update(value if isinstance(value, dict) else {kind: value})
    elif kind in ("txt", "caption", "text"):
        row[kind] = row["positive"] = data.decode().strip()
    else:
        row[kind] = data


def _is_member(member: tarfile.TarInfo) -> bool:
    """Whether a member is part of a row: a file, and not one that a Mac hides beside each (._a.jpg)."""
    return member.isfile() and not Path(member.name).name.startswith(".")


def _parts(name: str) -> tuple[str, str]:
    """A member's key, and what follows the first dot."""
    folder, slash, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return folder + slash + stem, kind.lower()


def _index(name: str) -> tuple[np.ndarray, str]:
    """Where each row of a tar begins, at last where the last one ends; and what is wrong with the file, if anything.

    Raises:
        CafeError: it cannot be read at all.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = home / "cafe" / "tars" / f"{hashlib.blake2b(file_version(name).encode(), digest_size=16).hexdigest()}.npy"
    with suppress(OSError):  # it is not there yet, or may not be read
        return np.load(kept), ""
    starts, key, end, damage = [], None, 0, ""
    with file_errors(name), fsspec.open(name) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if _is_member(member) and _parts(member.name)[0] != key:
                        key = _parts(member.name)[0]
                        starts.append(member.offset)
                    end = tar.offset
            file.seek(end)
            if any(block := file.read(512)) or len(block) < 512:
                damage = "the file ends without its end mark"
        except tarfile.TarError as error:
            if not starts:
                raise CafeError(f"The data file {name} cannot be read: {error}.") from None
            damage, end = str(error), starts.pop()
    index = np.array([*starts, end], np.int64)
    if not damage:
        with suppress(OSError):  # a home that cannot be written to: the index is made again the next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{os.getpid()}")
            with partial.open("wb") as out:
                np.save(out, index)
            partial.replace(kept)
    return index, damage


class HFDataset:
    """A dataset of the Hugging Face `datasets` library, which the extra "datasets" installs.

    A folder that `save_to_disk` wrote is opened as it is; another folder, or the name behind `dataset:`, goes to
    `load_dataset`, which knows pictures in folders (imagefolder), parquet, CSV and the Hub. Pictures are not decoded.
    """

    def __init__(self, name: str, split: str, subset: str) -> None:
        try:
            import datasets
        except ImportError:
            raise CafeError(f"{name} needs the datasets library: pip install 'cafe-lvlm[datasets]'.") from None
        self.name = name
        path = name.removeprefix("dataset:")
        try:
            if any((Path(path) / file).is_file() for file in ("state.json", "dataset_dict.json")):
                found = datasets.load_from_disk(path)
            else:
                found = datasets.load_dataset(path, subset or None)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise CafeError(f"{name} cannot be read as a dataset: {error}") from None
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise CafeError(f"{name} has no split {split!r}; there are {', '.join(found)}.")
            found = found[split]
        self.table = found.with_format("arrow")
        self.chunks = [len(found)]

    def __getitem__(self, index: int) -> Any:
        return self.table[index].to_pylist()[0]


class UnreadableFile:
    """Stands for a file that cannot be read, beside others that can: so many rows, and all of them damaged."""

    def __init__(self, name: str, reason: str, rows: int) -> None:
        self.name, self.reason, self.chunks = name, reason, [rows]

    def __getitem__(self, index: int) -> Any:
        raise CafeError(self.reason)
