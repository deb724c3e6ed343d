"""Bytes from a local path or an object store: one name, one way, through fsspec.

A name is a path or a URL (`s3://`, `gs://`, `hf://`, `memory://`, ... whichever fsspec's packages are installed; also
chained, as in `simplecache::s3://`, which keeps a copy on disk). File systems are looked up at every use and never
held: a worker process must not use the connections of the one that started it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import fsspec

from cafe.errors import CafeError


def is_url(name: str) -> bool:
    """Whether a name is a URL and no local path."""
    return "://" in name


def join(folder: str, name: str) -> str:
    """A name inside a folder; an absolute path or a URL stays what it is."""
    if is_url(name) or Path(name).is_absolute():
        return name
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def folder_of(name: str) -> str:
    """The folder that a file is in."""
    return name.rpartition("/")[0] if is_url(name) else str(Path(name).parent)


def expand_pattern(pattern: str) -> list[str]:
    """The files of a pattern in the order of their names: `*`, `?` and `[...]` are looked up, `{000..012}` counts and
    `{a,b}` lists. A name without any of these is returned as it is, whether or not there is such a file; so is a local
    file's that has `[...]` in it.

    Raises:
        CafeError: nothing matches.
    """
    found: list[str] = []
    for name in _braces(pattern):
        if not re.search(r"[*?\[]", name) or (not is_url(name) and Path(name).is_file()):
            found.append(name)
            continue
        chain, colons, last = name.rpartition("::")
        with file_errors(name):
            fs, path = fsspec.url_to_fs(last)
            matches = sorted(str(match) for match in fs.glob(path))
        found += [chain + colons + (fs.unstrip_protocol(match) if is_url(last) else match) for match in matches]
    if not found:
        raise CafeError(f"No data file matches {pattern}.")
    return found


def _braces(pattern: str) -> list[str]:
    pieces = []
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        counted = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece)
        if counted:
            first, last = counted.groups()
            pieces.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
        else:
            pieces.append(piece[1:-1].split(",") if piece.startswith("{") else [piece])
    return ["".join(chosen) for chosen in product(*pieces)]


def read(name: str, start: int | None = None, stop: int | None = None) -> bytes:
    """A file's bytes, or those from `start` to `stop` alone.

    Raises:
        CafeError: it is missing or cannot be read.
    """
    with file_errors(name):
        fs, path = fsspec.url_to_fs(name)
        data: bytes = fs.cat_file(path, start, stop)
        return data


def file_version(name: str) -> str:
    """A text that changes when the file does.

    Raises:
        CafeError: it is missing or cannot be read.
    """
    with file_errors(name):
        fs, path = fsspec.url_to_fs(name)
        return f"{name} {fs.ukey(path)}"


@contextmanager
def file_errors(name: str) -> Iterator[None]:
    """Within it, whatever goes wrong with a file is one sentence that names it."""
    try:
        yield
    except FileNotFoundError:
        raise CafeError(f"The data file {name} does not exist.") from None
    except (OSError, ValueError, ImportError) as error:  # ValueError: no such protocol; ImportError: its package
        raise CafeError(f"The data file {name} cannot be read: {error}.") from None
