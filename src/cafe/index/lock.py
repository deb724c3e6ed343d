"""One writer at a time for a collection; readers need no lock."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cafe.errors import CafeError
from cafe.index.faults import storage_errors
from cafe.index.manifest import LOCK_FILE


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a collection's directory, which the system releases however this process ends.

    Raises:
        CafeError: another process holds it, or the directory cannot be written to.
    """
    with storage_errors(directory):
        (directory / LOCK_FILE).touch()
    with open(directory / LOCK_FILE, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(20).strip()
            raise CafeError(
                f"The collection {directory} is being written by another process ({owner}): wait until it has ended."
            ) from None
        # Who it is, for the message above.
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
