"""Write-then-rename: files and directories that are complete or absent, wherever writing them is interrupted."""

import os
import shutil
from pathlib import Path


def staging_path(path: Path) -> Path:
    """Return where to write what `commit` will move to `path`."""
    return path.with_name(f".{path.name}.partial")


def commit(partial: Path, path: Path) -> None:
    """Sync a written file or directory to disk and move it to `path`, in place of what is there."""
    # The contents before the rename: after a power cut a name must never point to what was not written.
    for written in [*partial.rglob("*"), partial]:
        _sync(written)
    if path.is_dir():
        # A directory cannot be renamed over another: move the old one out of the way first.
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, path)
    _sync(path.parent)  # the rename itself


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file that is complete or absent."""
    staging_path(path).write_text(text)
    commit(staging_path(path), path)


def _sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
