"""Where collections are: by name in the user's data folder, or in any directory."""

import os
import re
from pathlib import Path

from cafe.errors import CafeError
from cafe.index.manifest import CURRENT_FILE

DEFAULT_NAME = "default"
MAX_NAME = 255  # bytes, of a directory


def collections_home() -> Path:
    """Return the folder of the collections that have a name."""
    data_home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"  # as the XDG base directory specification says
    return Path(data_home).expanduser() / "cafe" / "collections"


def locate_collection(name: str | Path) -> Path:
    """Return the directory of a collection, which need not exist.

    Args:
        name: a name, or the path of a directory, which is absolute or has a slash in it.

    Raises:
        CafeError: no collection can be called so.
    """
    path = Path(os.path.expanduser(name))
    if isinstance(name, Path) or path.is_absolute() or os.sep in str(name):
        return path.absolute()
    if not re.fullmatch(r"\w[\w. -]*", str(name)) or len(os.fsencode(name)) > MAX_NAME:
        raise CafeError(
            f"A collection cannot be called {str(name)!r}: a name has letters, digits, spaces, dots and dashes, "
            f"and at most {MAX_NAME} bytes; the path of a directory has a slash in it."
        )
    return collections_home() / str(name)


def list_collections() -> list[Path]:
    """Return the directories of the collections that have a name, in order."""
    return sorted(file.parent for file in collections_home().glob(f"*/{CURRENT_FILE}"))


def collection_argument(directory: Path) -> str:
    """Return what commands call a collection: its name, or the path of a directory elsewhere."""
    return directory.name if directory.parent == collections_home() else str(directory)


def no_collection(directory: Path) -> CafeError:
    """Return the error for a collection that does not exist."""
    return CafeError(f"There is no collection {directory}: make one by `cafe index FOLDER --model CHECKPOINT`.")
