"""Write-then-rename: files and directories that are complete or absent, wherever writing them is interrupted."""

import os
import shutil
from pathlib import Path
from uuid import uuid4


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
    """Write a text file in UTF-8 that is complete or absent, also while another process writes the same."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file that is complete or absent, also while another process writes the same."""
    # A name of its own: a process that finds another's half-written file would finish it, or move it away.
    partial = staging_path(path.with_name(f"{path.name}.{uuid4().hex}"))
    try:
        partial.write_bytes(data)
        commit(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
