"""WebDataset tars, read by an index of their rows."""

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
from cafe.errors import CafeError


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
