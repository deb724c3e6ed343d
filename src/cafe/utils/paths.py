"""Paths as people write them, and where they lead."""

import os
from pathlib import Path
from typing import Any


def is_within(path: str | Path, folder: str | Path) -> bool:
    """Tell whether a path leads into a folder, links resolved; False for what no file can be called."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # a NUL or half a character
        return False


def expand_home(config: Any, *names: str) -> None:
    """Expand a leading `~` or `~user` in fields of a frozen dataclass, in its `__post_init__`.

    Any other `~`, and one of a user who does not exist, stays as it is.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str):
            object.__setattr__(config, name, os.path.expanduser(value))
