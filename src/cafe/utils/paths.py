"""Paths as people write them."""

import os
from typing import Any


def expand_home(config: Any, *names: str) -> None:
    """Expand a leading `~` or `~user` in fields of a frozen dataclass, in its `__post_init__`.

    Any other `~`, and one of a user who does not exist, stays as it is.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str):
            object.__setattr__(config, name, os.path.expanduser(value))
