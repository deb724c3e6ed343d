"""WebDataset tars, read by an index of where each row begins.

The index is built by one pass over the file's headers and kept in the user's cache. Rows are read by byte range, so a
tar on an object store is never downloaded whole.
"""

import hashlib
import io
import json
import logging
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from cafe.content import ImageLimits
from cafe.data.files import file_errors, file_version, read
from cafe.data.image_fields import is_image_name
from cafe.errors import CafeError, RecordError
from cafe.utils.atomic import atomic_write_bytes
from cafe.utils.text import shorten

logger = logging.getLogger(__name__)

BLOCK = 512  # bytes, of which tars are made
TEXT_SUFFIXES = ("txt", "caption", "text")


class Tar:
    """Read a tar in which files whose names agree up to the first dot are one row.

    A row has the fields of its .json, its text (.txt, .caption) under "positive" and under its own suffix, and all its
    images, in their order in the file, under "image" and "query_image". A truncated file ends in one damaged row.

    Args:
        name: a path or URL.
        max_bytes: the most bytes of a row.
    """

    def __init__(self, name: str, max_bytes: int = ImageLimits.max_bytes) -> None:
        self.name, self.max_bytes = name, max_bytes
        self.starts, self.damage = _load_index(name)
        self.num_whole_rows = len(self.starts) - 1  # the last number is where the last row ends
        self.chunks = [self.num_whole_rows + bool(self.damage)]

    def __getitem__(self, index: int) -> Any:
        if index >= self.num_whole_rows:
            raise RecordError(f"the rest of the file is lost: {self.damage}.")
        start, stop = self.starts[index : index + 2].tolist()
        self._check_size(stop - start)
        # A row's range of bytes is itself a tar, but for the end mark, which tarfile does not insist on.
        data = read(self.name, start, stop)
        row = _Row()
        num_bytes = 0
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for member in filter(_is_member, tar):
                    # A sparse member holds more than the file does.
                    num_bytes += member.size
                    self._check_size(num_bytes)
                    content = tar.extractfile(member).read()  # type: ignore[union-attr]  # None for folders alone
                    row.add(member.name, content)
        except (tarfile.TarError, ValueError, RecursionError, OverflowError) as error:
            raise RecordError(f"the row is damaged: {error}.") from None
        return row.finish()

    def _check_size(self, num_bytes: int) -> None:
        """Raise `RecordError` if a row of so many bytes is too large."""
        if num_bytes > self.max_bytes:
            limit = f"{self.max_bytes:,} (data.max_image_bytes)"
            raise RecordError(f"the row holds {num_bytes:,} bytes or more, over the limit of {limit}.")


class _Row:
    """Gather the members of a tar that are one row."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.images: list[bytes] = []
        self.names: set[str] = set()
        self.json_fields: dict[str, str] = {}  # the member that each is from
        self.stems: dict[str, set[str]] = {"image": set(), "text": set()}  # names without their last suffix

    def add(self, name: str, data: bytes) -> None:
        """Add a member.

        Raises:
            RecordError: its name occurs twice.
            ValueError: it is damaged.
        """
        if name in self.names:
            raise RecordError(f"the name {shorten(name)} occurs twice in the row.")
        self.names.add(name)
        self.fields["__key__"], suffix = _split_name(name)
        if is_image_name(name):
            self.images.append(data)
            self._note_stem("image", name)
        elif suffix.endswith("json"):
            self._add_json(name, suffix, data)
        elif suffix in TEXT_SUFFIXES:
            self.fields[suffix] = self.fields["positive"] = data.decode().strip()
        else:
            self.fields[suffix] = data
        if suffix.rpartition(".")[2] in ("json", *TEXT_SUFFIXES):
            self._note_stem("text", name)

    def finish(self) -> dict[str, Any]:
        """Return the row.

        Raises:
            RecordError: it is several, whose names agree up to the first dot.
        """
        records = sorted(self.stems["image"] & self.stems["text"])
        if len(records) > 1:
            raise _merged(*records[:2])
        if self.images:
            self.fields |= {"image": self.images, "query_image": self.images}
        return self.fields

    def _add_json(self, name: str, suffix: str, data: bytes) -> None:
        """Add the fields of a JSON object; what is none, such as a list of turns, is one field."""
        value = json.loads(data)
        fields = value if isinstance(value, dict) else {suffix: value}
        for field, content in fields.items():
            other = self.json_fields.setdefault(field, name)
            if other != name and self.fields[field] != content:
                raise _merged(other, name)
        self.fields.update(fields)

    def _note_stem(self, kind: str, name: str) -> None:
        """Note that there is an image or a text of this name without its last suffix."""
        self.stems[kind].add(name.rpartition(".")[0])


def _merged(one: str, other: str) -> RecordError:
    """Return the error for two records whose names make them one row."""
    return RecordError(
        f"{shorten(one)} and {shorten(other)} are one row, because a row's name ends at its first dot: rename files "
        "that have dots in their names."
    )


def _is_member(member: tarfile.TarInfo) -> bool:
    """Return whether a member belongs to a row: a file, and not one that macOS hides beside it (._a.jpg)."""
    return member.isfile() and not Path(member.name).name.startswith(".")


def _split_name(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot after its folder, into its row's key and its suffix."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return folder + slash + stem, suffix.lower()


def _load_index(name: str) -> tuple[np.ndarray, str]:
    """Return where each row begins, followed by where the last one ends; and what is wrong with the file, if anything.

    Raises:
        CafeError: it cannot be read at all.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # Named by the file's version, so that the index of a file that has changed is not used.
    key = hashlib.blake2b(file_version(name).encode(), digest_size=16).hexdigest()
    path = cache / "cafe" / "tars" / f"{key}.npy"
    index = _read_index(path)
    if index is not None:
        return index, ""
    index, damage = _build_index(name)
    if not damage:  # the cache holds no word about it
        with suppress(OSError):  # the cache is not writable: the index is built again next time
            _write_index(path, index)
    return index, damage


def _read_index(path: Path) -> np.ndarray | None:
    """Read an index from the cache; None if there is none, or a damaged one."""
    if not path.is_file():
        return None
    try:
        index = np.load(path, allow_pickle=False)
        if _is_index(index):
            return index
    except Exception as error:  # NumPy raises ValueError, EOFError, SyntaxError and others
        logger.debug("%s", error)
    logger.warning("The index %s in the cache is damaged and is built again.", path)
    return None


def _is_index(index: Any) -> bool:
    """Return whether an array can be the index of a tar: rising multiples of the size of a block."""
    if not isinstance(index, np.ndarray) or index.dtype != np.int64 or index.ndim != 1 or not len(index):
        return False
    return bool(index[0] >= 0 and (np.diff(index) > 0).all() and not (index % BLOCK).any())


def _build_index(name: str) -> tuple[np.ndarray, str]:
    """Read the headers of a tar, and see whether it is complete."""
    starts: list[int] = []
    key, end, damage = None, 0, ""
    with file_errors(name), fsspec.open(name) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    member_key, _ = _split_name(member.name)
                    # A row begins where the key changes; its files follow each other.
                    if _is_member(member) and member_key != key:
                        key = member_key
                        starts.append(member.offset)
                    end = tar.offset
            # A whole tar ends with a block of zeros; tarfile accepts one that was cut between two members.
            file.seek(end)
            block = file.read(BLOCK)
            if any(block) or len(block) < BLOCK:
                damage = "the file ends without its end mark"
        except (tarfile.TarError, MemoryError, OverflowError) as error:  # the last two for sizes beyond any memory
            if not starts:
                raise CafeError(f"The data file {name} cannot be read: {error}.") from None
            damage, end = str(error), starts.pop()  # the row that was being read is lost
    return np.array([*starts, end], np.int64), damage


def _write_index(path: Path, index: np.ndarray) -> None:
    """Write an index that is there complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, index)
    atomic_write_bytes(path, buffer.getvalue())
