"""Thumbnails of a collection's images: drawn anew, so that nothing of a file but its pixels reaches a browser."""

import io
import os
from collections.abc import Sequence
from enum import IntEnum

from PIL import Image

from cafe.index.manifest import Root
from cafe.index.searching import Hit
from cafe.lvlm.processing import ChatProcessor
from cafe.serving.image_workers import ImageWorkers
from cafe.serving.lru import Lru
from cafe.serving.place_images import load_place

CACHE_BYTES = 32 * 2**20
QUALITY = 84  # of the JPEG files
Thumbnails = Lru[tuple[str, int, int], bytes]


class ThumbnailSize(IntEnum):
    """Name the pixels of the longer side that a thumbnail may have."""

    SMALL = 256
    MEDIUM = 512
    LARGE = 1024


def read_thumbnail(hit: Hit, size: int, images: ImageWorkers, roots: Sequence[Root], kept: Thumbnails) -> bytes:
    """Return a thumbnail as a JPEG file.

    Args:
        hit: the image.
        size: the pixels of its longer side; a smaller image keeps its size.
        images: the workers.
        roots: what the collection was made of.
        kept: the thumbnails that were asked for last.

    Raises:
        CafeError: the image cannot be read.
        OSError: its file is gone.
        OverloadedError: too many images are waiting.
    """
    # A file that has changed since is another image. A source may be one that is no file.
    is_local = os.path.isabs(hit.path)
    key = (hit.id, os.stat(hit.path).st_mtime_ns if is_local else 0, size)
    place = hit.id, hit.path, hit.page, tuple(roots)
    data, _ = kept.get_or_make(key, lambda: images.call(make_thumbnail, *place, size), len)
    return data


def make_thumbnail(
    chat_processor: ChatProcessor, id: str, path: str, page: int | None, roots: Sequence[Root], size: int
) -> bytes:
    """Make the thumbnail of a place; called in a worker, see `load_place`."""
    # A large JPEG is decoded at a fraction of its size.
    return encode_thumbnail(load_place(chat_processor, id, path, page, roots, min_side=size), size)


def encode_thumbnail(image: Image.Image, size: int) -> bytes:
    """Reduce an RGB image, and encode it as a JPEG file."""
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Colors of small drawings suffer most where they are kept at half the size.
    subsampling = "4:2:0" if max(image.size) >= ThumbnailSize.SMALL else "4:4:4"
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=subsampling, optimize=True)
    return buffer.getvalue()
