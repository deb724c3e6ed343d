"""Collections for the tests of searching: of vectors that were made up, and of scenes that a tiny model embedded."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cafe.images.appearance import NUM_BYTES
from cafe.index.collection import Collection
from cafe.index.indexing import IndexConfig
from cafe.index.snapshot import Snapshot
from cafe.index.store import ImageRow, Place, Store
from cafe.model import Cafe

FAST = IndexConfig(num_workers=0)


@cache
def load(base: Path) -> Cafe:
    """Load a model once for all tests."""
    return Cafe.load(base)


def unit_vectors(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Return random directions, exactly as the tables hold them: in half precision."""
    vectors = np.random.default_rng(seed).normal(size=(count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def write_store(
    directory: Path,
    vectors: np.ndarray,
    images: Mapping[int, Mapping[str, Any]] | None = None,
    places: Mapping[int, Mapping[str, Any]] | None = None,
) -> Store:
    """Write a collection's tables, of images with the keys key000, key001, ... in files /photos/0.png, ...

    Args:
        directory: the generation, which is made.
        vectors: of the images.
        images, places: other values of an image or of its place than the usual ones, by its number.
    """
    directory.mkdir(parents=True)
    store = Store.create(directory, vectors.shape[1])
    rows, files = [], []
    for number, vector in enumerate(vectors):
        row = {"caption": None, "caption_vector": None, "text": "", "width": 640, "height": 480, "taken_at": None}
        row |= {"appearance": bytes(NUM_BYTES), **(images or {}).get(number, {})}
        rows.append(ImageRow(key=f"key{number:03}", vector=vector, **row))
        path = f"/photos/{number}.png"
        place = {"id": path, "path": path, "page": None, "name": f"{number}.png", "root": "/photos", "size": 1}
        place |= {"mtime_ns": 10**18, "key": f"key{number:03}", **(places or {}).get(number, {})}
        files.append(Place(**place))
    store.write(rows, files)
    store.index_words()
    return store


def write_snapshot(directory: Path, vectors: np.ndarray, **others: Any) -> Snapshot:
    """Write a collection's tables and read them for a search."""
    return Snapshot.read(write_store(directory, vectors, **others))


def numbers_of(hits: Sequence[Any]) -> list[int]:
    """Return the numbers of images that were found, from their keys."""
    return [int(hit.key.removeprefix("key")) for hit in hits]


def index(directory: Path, base: Path, *folders: Path, **options: Any) -> Collection:
    """Index folders with a tiny model."""
    collection = Collection.open(directory, load(base))
    for folder in folders:
        collection.add(folder, config=FAST, **options)
    return collection
