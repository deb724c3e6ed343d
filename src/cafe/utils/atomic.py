"""Files and directories that are there complete or not at all, wherever writing them breaks off."""

import os
import shutil
from pathlib import Path


def staging_path(path: Path) -> Path:
    """Where to write what will be placed at `path`."""
    return path.with_name(f".{path.name}.partial")


def commit(partial: Path, path: Path) -> None:
    """Gives a file or a directory that is written its name, once it is on the disk; what had the name is gone then."""
    for written in [*partial.rglob("*"), partial]:
        _sync(written)
    if path.is_dir():  # a directory cannot be renamed over another
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, path)
    _sync(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a file whole."""
    staging_path(path).write_text(text)
    commit(staging_path(path), path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
