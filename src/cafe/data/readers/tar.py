"""WebDataset tars, read by an index of where each row begins.

The index is built by one pass over the file's headers and kept in the user's cache. Rows are read by byte range, so a
tar on an object store is never downloaded whole.
"""

import hashlib
import io
import json
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from cafe.data.files import file_errors, file_version, read
from cafe.data.image_fields import is_image_name
from cafe.errors import CafeError, RecordError

BLOCK = 512  # bytes, of which tars are made


class Tar:
    """Read a tar in which files whose names agree up to the first dot are one row.

    A row has the fields of its .json, its text (.txt, .caption) under "positive" and under its own suffix, and all its
    images, in their order in the file, under "image" and "query_image". A truncated file ends in one damaged row.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.starts, self.damage = _load_index(name)
        self.num_whole_rows = len(self.starts) - 1  # the last number is where the last row ends
        self.chunks = [self.num_whole_rows + bool(self.damage)]

    def __getitem__(self, index: int) -> Any:
        if index >= self.num_whole_rows:
            raise RecordError(f"the rest of the file is lost: {self.damage}.")
        # A row's range of bytes is itself a tar, but for the end mark, which tarfile does not insist on.
        data = read(self.name, int(self.starts[index]), int(self.starts[index + 1]))
        row: dict[str, Any] = {}
        images: list[bytes] = []
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for member in filter(_is_member, tar):
                    content = tar.extractfile(member).read()  # type: ignore[union-attr]  # None for folders alone
                    _add_member(row, images, member.name, content)
        except (tarfile.TarError, ValueError) as error:
            raise RecordError(f"the row is damaged: {error}.") from None
        if images:
            row |= {"image": images, "query_image": images}
        return row


def _add_member(row: dict[str, Any], images: list[bytes], name: str, data: bytes) -> None:
    """Add a member of a tar to its row, or to the row's images."""
    row["__key__"], suffix = _split_name(name)
    if is_image_name(name):
        images.append(data)
    elif suffix.endswith("json"):
        value = json.loads(data)
        # What is not an object, such as a list of turns, is one field.
        fields = value if isinstance(value, dict) else {suffix: value}
        row.update(fields)
    elif suffix in ("txt", "caption", "text"):
        row[suffix] = row["positive"] = data.decode().strip()
    else:
        row[suffix] = data


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
    with suppress(OSError):  # not there yet, or not readable
        return np.load(path), ""
    index, damage = _build_index(name)
    if not damage:  # the cache holds no word about it
        with suppress(OSError):  # the cache is not writable: the index is built again next time
            _write_index(path, index)
    return index, damage


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
        except tarfile.TarError as error:
            if not starts:
                raise CafeError(f"The data file {name} cannot be read: {error}.") from None
            damage, end = str(error), starts.pop()  # the row that was being read is lost
    return np.array([*starts, end], np.int64), damage


def _write_index(path: Path, index: np.ndarray) -> None:
    """Write an index that is there complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")  # several workers may write it at the same time
    with partial.open("wb") as out:
        np.save(out, index)
    partial.replace(path)
