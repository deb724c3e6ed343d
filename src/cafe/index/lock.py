"""One writer at a time for a collection; readers need no lock."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cafe.errors import CafeError
from cafe.index.faults import storage_errors
from cafe.index.manifest import LOCK_FILE


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a collection's directory, which the system releases however this process ends.

    Raises:
        CafeError: another process holds it or has just removed the collection, or the directory cannot be written to.
    """
    with storage_errors(directory):
        handle = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(handle, directory)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, directory: Path) -> None:
    """Lock an open file, and write into it which process holds it."""
    with storage_errors(directory):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 20).decode(errors="replace").strip()
            raise CafeError(
                f"The collection {directory} is being written by another process ({owner}): wait until it has ended."
            ) from None
        # The holder before may have removed the collection after this process opened the file.
        if not os.fstat(handle).st_nlink:
            raise CafeError(f"The collection {directory} has just been removed: run the same command again.")
    # For the message above alone: on a full disk, a collection can be removed all the same.
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
