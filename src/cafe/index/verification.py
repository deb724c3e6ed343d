"""Check a collection: its rows, and the files that it knows."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from cafe.index.reading import DIGEST_CHARACTERS
from cafe.index.store import Store, to_matrix
from cafe.utils.text import escape_controls

_TOLERANCE = 1e-2  # of the norm of a unit vector in half precision


def verify_tables(store: Store) -> list[str]:
    """Check that no row is there twice, that all places have an image, and that vectors are unit vectors."""
    images = store.read_images(["key", "vector"])
    places = store.read_places(["id", "key"])
    keys, ids = images["key"].to_pylist(), places["id"].to_pylist()
    problems = [f"The image {key} is there {count} times." for key, count in Counter(keys).items() if count > 1]
    for id, count in Counter(ids).items():
        if count > 1:
            problems.append(f"The place {escape_controls(id)} is there {count} times.")

    known = set(keys)
    for id, key in zip(ids, places["key"].to_pylist(), strict=True):
        if key is not None and key not in known:
            problems.append(f"The image of {escape_controls(id)} is missing: index it again.")

    missing = images["vector"].is_null()
    problems += [f"The image {key} has no vector: index it again." for key in images.filter(missing)["key"].to_pylist()]
    return problems + _wrong_norms(images.filter(pc.invert(missing)), store.dim)


def _wrong_norms(images: pa.Table, dim: int) -> list[str]:
    """Check that vectors are unit vectors."""
    norms = np.linalg.norm(to_matrix(images["vector"].combine_chunks(), dim), axis=1)
    keys = images["key"].to_pylist()
    return [
        f"The vector of the image {keys[row]} has the norm {norms[row]:.3f} instead of 1."
        for row in np.flatnonzero(~(np.abs(norms - 1) <= _TOLERANCE))
    ]


def verify_files(store: Store, progress: bool = False) -> list[str]:
    """Read the files that have not changed since they were indexed, and check that they hold what they held.

    Args:
        store: the tables.
        progress: show a progress bar.
    """
    # Only files that are as they were by size and time: others are for the next run of indexing.
    problems: list[str] = []
    rows = store.read_places(["path", "size", "mtime_ns", "key", "page"]).to_pylist()
    # Pages share a file; a record that holds its image has none, and the size 0.
    files = {row["path"]: row for row in rows if row["key"] is not None and row["size"] > 0}
    for path, row in tqdm(files.items(), desc="verify", unit="file", disable=not progress, leave=False):
        name = escape_controls(path)
        try:
            status = os.stat(path)
            if (status.st_size, status.st_mtime_ns) != (row["size"], row["mtime_ns"]):
                problems.append(f"{name} has changed: index again.")
            elif _digest_of(Path(path)) != row["key"].partition("#")[0]:
                problems.append(f"{name} has other bytes than when it was indexed, at the same time of change.")
        except (FileNotFoundError, NotADirectoryError):
            problems.append(f"{name} is gone: index again.")
        except OSError as error:  # permissions, or a bad disk
            problems.append(f"{name} cannot be read: {error.strerror or error}.")
    return problems


def _digest_of(path: Path) -> str:
    """Return the key of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_CHARACTERS]
