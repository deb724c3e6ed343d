"""Read bytes from a local path or an object store through fsspec.

A name is a path or a URL (`s3://`, `gs://`, `hf://`, `memory://`, or whatever else fsspec's packages provide; also
chained, as in `simplecache::s3://`, which keeps a copy on disk). File systems are looked up at every use and never
held, because a worker process must not use its parent's connections.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import fsspec

from cafe.errors import CafeError
from cafe.utils.text import shorten


def is_url(name: str) -> bool:
    """Return whether a name is a URL, not a local path."""
    return "://" in name


def is_web(name: str) -> bool:
    """Return whether a name is a URL of a web server."""
    return name.lower().startswith(("http://", "https://"))


def local_path(name: str) -> Path | None:
    """Return the path of a local file, which may be named by a URL with `file://`; None for another URL."""
    if not is_url(name):
        return Path(name)
    scheme, _, path = name.partition("://")
    return Path(path) if scheme.lower() in ("file", "local") else None


def folder_of(name: str) -> str:
    """Return the folder that a file is in."""
    if is_url(name):
        return name.rpartition("/")[0]
    return str(Path(name).parent)


def expand_pattern(pattern: str) -> list[str]:
    """List the files that a pattern names, in order.

    `*`, `?` and `[...]` match existing files; `{000..012}` counts and `{a,b}` enumerates. A name without these is
    returned unchanged, whether or not there is such a file, and so is an existing local file with `[...]` in its name.

    Raises:
        CafeError: nothing matches.
    """
    names: list[str] = []
    for name in _expand_braces(pattern):
        # A bracket may be part of a name: [v1]/train.json.
        is_plain = not re.search(r"[*?\[]", name)
        is_local_file = not is_url(name) and Path(name).is_file()
        if is_plain or is_local_file:
            names.append(name)
        else:
            names += _glob(name)
    if not names:
        raise CafeError(f"No data file matches {pattern}.")
    return names


def _glob(name: str) -> list[str]:
    """List the existing files that match a name with wildcards."""
    # Of chained URLs only the last one is looked into: simplecache::s3://bucket/*.tar.
    chain, colons, last = name.rpartition("::")
    with file_errors(name):
        fs, path = fsspec.url_to_fs(last)
        matches = sorted(map(str, fs.glob(path)))
    # fsspec lists paths without their protocol.
    if is_url(last):
        matches = list(map(fs.unstrip_protocol, matches))
    return [chain + colons + match for match in matches]


def _expand_braces(pattern: str) -> list[str]:
    """List the names that the braces of a pattern stand for, in order."""
    # The group keeps the braces among the pieces.
    pieces = re.split(r"(\{[^{}]*\})", pattern)
    choices = map(_brace_choices, pieces)
    return ["".join(chosen) for chosen in product(*choices)]


def _brace_choices(piece: str) -> list[str]:
    """List what a piece of a pattern stands for: itself, unless it is in braces."""
    counted = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece)
    if counted:
        first, last = counted.groups()
        # As many digits as the first number has: {000..012}.
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    if piece.startswith("{"):
        return piece[1:-1].split(",")
    return [piece]


def read(name: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Read a file's bytes, or only those from `start` to `stop`, which may be beyond its end.

    Raises:
        CafeError: it is missing or cannot be read.
    """
    # The file system is looked up here, in the process that reads: see above.
    with file_errors(name):
        fs, path = fsspec.url_to_fs(name)
        data: bytes = fs.cat_file(path, start, stop)
        return data


def file_version(name: str) -> str:
    """Return a text that changes when the file does.

    Raises:
        CafeError: it is missing or cannot be read.
    """
    with file_errors(name):
        fs, path = fsspec.url_to_fs(name)
        return f"{name} {fs.ukey(path)}"  # of size and time of change, or the store's etag


@contextmanager
def file_errors(name: str) -> Iterator[None]:
    """Turn whatever goes wrong with a file into an error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise CafeError(f"The data file {shorten(name)} does not exist.") from None
    except CafeError:
        raise
    except Exception as error:  # each file system has errors of its own, as zip:// has for a file that is none
        raise CafeError(f"The data file {shorten(name)} cannot be read: {shorten(str(error))}.") from None
