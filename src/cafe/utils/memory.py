"""How much memory there is for this process."""

from contextlib import suppress
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Return the bytes that this process can still take: of the machine, or of its container or service if fewer."""
    available = psutil.virtual_memory().available
    with suppress(OSError, ValueError, StopIteration, KeyError):  # there are no control groups, or there is no limit
        available = min(available, _available_to_cgroup())
    return max(available, 0)


def _available_to_cgroup() -> int:
    """Return the bytes that are left of the limit of the control group (version 2) that this process is in.

    Raises:
        OSError, ValueError, StopIteration, KeyError: it has no limit.
    """
    lines = OWN_CGROUP.read_text().splitlines()
    path = next(line.removeprefix("0::/") for line in lines if line.startswith("0::"))
    folder = CGROUPS / path
    limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
    # Files that were read, as the model's weights, are kept in memory as long as nothing else needs it.
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return limit - (used - int(statistics["inactive_file"]))
