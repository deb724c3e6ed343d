"""Folders of images and collections of them, for the tests of `cafe.index`."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from samples import noise

from cafe.index.collection import Collection
from cafe.index.generation import open_store
from cafe.index.indexing import IndexConfig
from cafe.index.reading import FileItem, Item, Reader, Reading
from cafe.index.store import ImageRow, Place, Store

FAST = IndexConfig(num_workers=0)
NOBODY = 65534  # the user that owns nothing


def write_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write images of random values, all of them different."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        noise(seed + number, 24, 18).save(path)
    return paths


def write_pdf(path: Path, texts: list[str]) -> Path:
    """Write a PDF file with a text on each page."""
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    with PdfPages(path) as pages:
        for text in texts:
            figure = Figure(figsize=(2, 3))
            figure.text(0.1, 0.5, text)
            pages.savefig(figure)
    return path


def add(collection: Collection, what: Path | str, config: IndexConfig = FAST, **options: Any) -> dict[str, int]:
    """Index something, and return the counts that are not zero."""
    return {name: count for name, count in collection.add(what, config=config, **options).counts().items() if count}


def store_of(collection: Collection) -> Store:
    """Open the tables of a collection."""
    return open_store(collection._generation())[0]


def keys_of(collection: Collection) -> dict[str, str | None]:
    """Return the key of each place by its id."""
    rows = store_of(collection).read_places(["id", "key"]).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["key"] for row in rows}


def images_of(collection: Collection) -> pa.Table:
    """Return the table of images, in which no key is doubled."""
    table = store_of(collection).read_images(["key", "vector", "caption", "caption_vector", "text", "width", "height"])
    assert len(set(table["key"].to_pylist())) == len(table)
    return table


def vectors_of(collection: Collection, column: str = "vector") -> dict[str, np.ndarray]:
    """Return the vector of each place that has one."""
    table = images_of(collection)
    vectors = dict(zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True))
    return {id: np.array(vectors[key], np.float32) for id, key in keys_of(collection).items() if key}


def image_row(key: str, vector: np.ndarray, **changes: Any) -> ImageRow:
    """Make a row of the table of images."""
    values: dict[str, Any] = {"caption": None, "caption_vector": None, "text": "", "width": 2, "height": 3}
    return ImageRow(key, vector, taken_at=None, appearance=bytes(192), **{**values, **changes})


def place(id: str, key: str | None, **changes: Any) -> Place:
    """Make a place of a file."""
    values: dict[str, Any] = {"path": id, "page": None, "name": Path(id).name, "root": "/", "size": 1, "mtime_ns": 1}
    return Place(id, key=key, **{**values, **changes})


@contextmanager
def as_nobody() -> Iterator[None]:
    """Lose the rights of the superuser for a while, to whom no file is closed."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow for a while, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class CrashingReader(Reader):
    """End the process that reads an item of a certain name, as a decoder written in C may."""

    def _read(self, item: Item) -> Iterator[Reading]:
        if isinstance(item, FileItem) and "crash" in item.place.path:
            os._exit(1)
        yield from super()._read(item)
