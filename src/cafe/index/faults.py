"""Turn what a disk or LanceDB says into one error that names the collection."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from cafe.errors import CafeError, first_line
from cafe.utils.disk import is_disk_full

MAX_REASON = 300  # characters of LanceDB's message


@contextmanager
def storage_errors(collection: Path) -> Iterator[None]:
    """Turn the errors of LanceDB and of the system into one that names the collection.

    Raises:
        CafeError: the disk is full, the directory cannot be written to, or the collection is damaged.
    """
    try:
        yield
    except (RuntimeError, ValueError, OSError, pa.ArrowException) as error:
        if is_disk_full(error):
            raise CafeError(
                f"The disk of the collection {collection} is full: free some space and run the same command; what was "
                "written before is kept."
            ) from None
        if "ermission denied" in str(error) or "Read-only file system" in str(error):
            raise CafeError(f"The collection {collection} cannot be written to: permission denied.") from None
        raise CafeError(
            f"The collection {collection} is damaged or cannot be read: {first_line(error)[:MAX_REASON]} Index into a "
            "new collection, or restore this one from a backup."
        ) from error
