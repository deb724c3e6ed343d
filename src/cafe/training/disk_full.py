"""A full disk, wherever a run writes: a clear error, and nothing half written."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cafe.errors import CafeError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_full_errors(output: Path) -> Iterator[None]:
    """Turn the error that a full disk raises anywhere into a `CafeError`, and remove what was half written."""
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        # The staging paths of `cafe.utils.atomic`.
        for partial in output.glob(".*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        raise CafeError(
            f"{output} cannot be written to ({error}): free some space and run the same command to resume from the "
            "last saved state."
        ) from None


def _is_disk_full(error: Exception) -> bool:
    """Return whether an error is the system's, of a full disk, a full quota or a file too large for its disk."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    # safetensors is written in Rust: it has the number in its message alone.
    message = str(error)
    return any(f"os error {number}" in message for number in DISK_FULL)
