"""A full disk is told from other errors, whichever library met it."""

import errno

import pytest

from cafe.utils.disk import is_disk_full


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("lance error: LanceError(IO): No space left on device (os error 28)"), True),
        (RuntimeError("lance error: Permission denied (os error 13)"), False),
        (ValueError("28"), False),
    ],
)
def test_a_full_disk_is_known_by_its_number(error, is_full):
    assert is_disk_full(error) == is_full
