"""The pixels of an image that a search found, wherever it is: in a file, on a page, or in a source's record."""

import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from cafe.content import DEFAULT_LIMITS, ImageRef
from cafe.data.records import OpenedSource, open_source
from cafe.errors import CafeError, RecordError
from cafe.images.decoding import decode_image
from cafe.images.files import read_image_file
from cafe.index.manifest import Root
from cafe.index.pdf import read_pages
from cafe.index.reading import record_images
from cafe.index.searching import Hit
from cafe.training.recipe_io import read_source
from cafe.utils.processes import without_main_module

_RECORD = re.compile(r".*#record=(\d+)(?:\.(\d+))?", re.DOTALL)


def load_image(id: str, path: str, page: int | None, roots: Sequence[Root]) -> Image.Image:
    """Load the image of a place, upright and in RGB.

    Args:
        id: of the place, see `Place`.
        path: of its file or source.
        page: the number of the page; None for an image.
        roots: what the collection was made of.

    Raises:
        CafeError: it cannot be read.
    """
    if page is not None:
        return _load_page(path, page)
    if is_file(id, path, page):
        return decode_image(ImageRef(Path(path)))
    record = _RECORD.fullmatch(id)
    assert record
    return _load_record(path, int(record[1]), int(record[2] or 0), roots)


def is_file(id: str, path: str, page: int | None) -> bool:
    """Return whether the image of a place is a file by itself, neither a page nor in a record; see `load_image`."""
    # A file's own name may end like a record's id.
    return page is None and (id == path or not _RECORD.fullmatch(id))


def load_images(hits: Sequence[Hit], roots: Sequence[Root]) -> list[tuple[Hit, Image.Image]]:
    """Load the images of hits; those that are gone or have changed since they were indexed are left out."""
    loaded = []
    for hit in hits:
        with suppress(CafeError):
            loaded.append((hit, load_image(hit.id, hit.path, hit.page, roots)))
    return loaded


def _load_page(path: str, page: int) -> Image.Image:
    """Render a page, in a process of its own: pdfium may end it."""
    data = read_image_file(Path(path), DEFAULT_LIMITS.max_bytes)
    try:
        _, [read] = _call_in_process(read_pages, data, page, 1, path)
    except (BrokenProcessPool, ValueError):  # ValueError: it has fewer pages now
        raise RecordError(f"Page {page} of {path} cannot be read.") from None
    if isinstance(read, RecordError):
        raise read
    return read[0]


def _call_in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own, or in this one if it is a worker, which may end and has no children."""
    if multiprocessing.current_process().daemon:
        return function(*args)
    context = multiprocessing.get_context("spawn")
    with without_main_module(), ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args).result()


@lru_cache(maxsize=2)
def _open_source(path: str, overrides: tuple[str, ...], mtime_ns: int) -> OpenedSource:
    """Open a source, once for the images of many records; `mtime_ns` tells when it has changed."""
    return open_source(read_source(path, overrides))


def _load_record(path: str, number: int, index: int, roots: Sequence[Root]) -> Image.Image:
    """Load an image of a source's record."""
    overrides = next((root.overrides for root in roots if root.is_source and root.path == path), ())
    source = _open_source(path, overrides, os.stat(path).st_mtime_ns if os.path.exists(path) else 0)
    refs = record_images(source, number)[0] if number < len(source) else []
    if index >= len(refs):
        raise RecordError(f"Record {number} of {path} has changed: index it again.")
    return decode_image(refs[index])
