"""Tell a full disk from other errors, whichever library met it."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error is the system's, of a full disk, a full quota or a file too large for its disk."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    # Libraries written in Rust, such as safetensors and LanceDB, have the number in their message alone.
    message = str(error)
    return any(f"os error {number}" in message for number in DISK_FULL)
