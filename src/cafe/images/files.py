"""Read image files: regular files alone, and none that is too large."""

import os
import stat
from pathlib import Path

from cafe.errors import RecordError


def read_image_file(path: Path, max_bytes: int) -> bytes:
    """Read a file without ever waiting for it, as opening a pipe or a device may.

    Raises:
        RecordError: it is no regular file, or larger than `max_bytes`.
        OSError: it is missing or cannot be read.
    """
    # Before the file is opened, because opening a device may already do something.
    _check_regular(path, os.stat(path).st_mode)
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        # Once more, because another file may have taken its place in between.
        status = os.fstat(handle)
        _check_regular(path, status.st_mode)
        check_size(str(path), status.st_size, max_bytes)
        return file.read(status.st_size)


def check_size(name: object, size: int, max_bytes: int) -> None:
    """Make sure that an image of so many bytes may be read.

    Raises:
        RecordError: it is larger than `max_bytes`.
    """
    if size > max_bytes:
        limit = f"{max_bytes:,} (data.max_image_bytes)"
        raise RecordError(f"The image {name} has {size:,} bytes, over the limit of {limit}.")


def _check_regular(path: Path, mode: int) -> None:
    """Raise `RecordError` unless a file's mode is that of a regular file."""
    if stat.S_ISDIR(mode):
        raise RecordError(f"The image {path} is a directory.")
    if not stat.S_ISREG(mode):
        raise RecordError(f"The image {path} is a pipe or a device, not a regular file.")
