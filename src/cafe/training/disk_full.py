"""A full disk, wherever a run writes: a clear error, and nothing half written."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cafe.errors import CafeError
from cafe.utils.disk import is_disk_full


@contextmanager
def disk_full_errors(output: Path) -> Iterator[None]:
    """Turn the error that a full disk raises anywhere into a `CafeError`, and remove what was half written."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        # The staging paths of `cafe.utils.atomic`.
        for partial in output.glob(".*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        raise CafeError(
            f"{output} cannot be written to ({error}): free some space and run the same command to resume from the "
            "last saved state."
        ) from None
