"""The images of a collection, read in worker processes: no image can end the server."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from cafe.content import DEFAULT_LIMITS, ImageRef
from cafe.errors import CafeError, RecordError
from cafe.images.decoding import decode_image
from cafe.images.files import read_image_file
from cafe.index.manifest import Root
from cafe.index.pdf import read_pages
from cafe.index.pixels import is_file, load_image
from cafe.index.searching import Hit
from cafe.lvlm.processing import ChatProcessor
from cafe.serving.image_workers import ImageWorkers


def load_place(
    chat_processor: ChatProcessor, id: str, path: str, page: int | None, roots: Sequence[Root], min_side: int | None
) -> Image.Image:
    """Load the image of a place; called in a worker, which brings its chat processor.

    Args:
        chat_processor: is not needed.
        id, path, page: of the place, see `cafe.index.store.Place`.
        roots: what the collection was made of.
        min_side: the pixels of a side that are enough.

    Raises:
        CafeError: it cannot be read.
    """
    if page is not None:
        # In this process, which may end without harm.
        _, pages = read_pages(read_image_file(Path(path), DEFAULT_LIMITS.max_bytes), page, 1, path)
        if not pages:
            raise RecordError(f"{path} has no page {page} any more.")
        if isinstance(pages[0], RecordError):
            raise pages[0]
        return pages[0][0]
    if is_file(id, path, page):
        return decode_image(ImageRef(Path(path)), min_side)
    return load_image(id, path, page, roots)


def source_refs(hits: Sequence[Hit], roots: Sequence[Root], images: ImageWorkers) -> tuple[list[Hit], list[ImageRef]]:
    """Return the hits that can still be read, with their images; files are decoded later, where the model reads them.

    Args:
        hits: of a collection.
        roots: what it was made of.
        images: read pages, and the images of records.
    """
    sources: list[Hit] = []
    refs: list[ImageRef] = []
    for hit in hits:
        try:
            ref = _source_ref(hit, roots, images, f"image {len(refs) + 1}")
        except (CafeError, OSError):
            continue
        sources.append(hit)
        refs.append(ref)
    return sources, refs


def _source_ref(hit: Hit, roots: Sequence[Root], images: ImageWorkers, name: str) -> ImageRef:
    """Return the image of a hit.

    Raises:
        CafeError: a page or a record cannot be read.
        OSError: a file cannot be read.
    """
    # As bytes, by which what the model made of them is found again.
    if is_file(hit.id, hit.path, hit.page):
        return ImageRef(read_image_file(Path(hit.path), DEFAULT_LIMITS.max_bytes), name=name)
    return ImageRef(images.call(load_place, hit.id, hit.path, hit.page, tuple(roots), None), name=name)
