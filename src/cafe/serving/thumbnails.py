"""Thumbnails of a collection's images: drawn anew, so that nothing of a file but its pixels reaches a browser."""

import io
import os
from collections import OrderedDict
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from threading import Lock

from PIL import Image

from cafe.content import ImageRef
from cafe.images.decoding import decode_image
from cafe.index.manifest import Root
from cafe.index.pixels import is_file, load_image
from cafe.index.searching import Hit
from cafe.lvlm.processing import ChatProcessor
from cafe.serving.image_workers import ImageWorkers

CACHE_BYTES = 32 * 2**20
QUALITY = 84  # of the JPEG files


class ThumbnailSize(IntEnum):
    """Name the pixels of the longer side that a thumbnail may have."""

    SMALL = 256
    MEDIUM = 512
    LARGE = 1024


class Thumbnails:
    """Make thumbnails in worker processes, and keep those that were asked for last.

    Attributes:
        max_bytes: of those that are kept.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._num_bytes = 0
        self._lock = Lock()

    def get(self, hit: Hit, size: int, images: ImageWorkers, roots: Sequence[Root]) -> bytes:
        """Return a thumbnail as a JPEG file.

        Args:
            hit: the image.
            size: the pixels of its longer side; a smaller image keeps its size.
            images: the workers.
            roots: what the collection was made of.

        Raises:
            CafeError: the image is gone or cannot be read.
            OSError: its file is gone.
        """
        # A file that has changed since is another image.
        key = (hit.id, os.stat(hit.path).st_mtime_ns if os.path.isabs(hit.path) else 0, size)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        data = _make(hit, size, images, roots)
        self._keep(key, data)
        return data

    def _keep(self, key: tuple[str, int, int], data: bytes) -> None:
        """Keep a thumbnail, and drop those that were not asked for the longest."""
        with self._lock:
            # Another thread may have made the same meanwhile.
            self._num_bytes += len(data) - len(self._kept.pop(key, b""))
            self._kept[key] = data
            while self._num_bytes > self.max_bytes:
                _, dropped = self._kept.popitem(last=False)
                self._num_bytes -= len(dropped)


def _make(hit: Hit, size: int, images: ImageWorkers, roots: Sequence[Root]) -> bytes:
    """Make a thumbnail where it harms nobody: of a file or a record in a worker."""
    if hit.page is not None:
        # A page is drawn in a process of its own already, which a worker may not start.
        return encode_thumbnail(load_image(hit.id, hit.path, hit.page, roots), size)
    data: bytes = images.call(make_thumbnail, hit.id, hit.path, tuple(roots), size)
    return data


def make_thumbnail(chat_processor: ChatProcessor, id: str, path: str, roots: Sequence[Root], size: int) -> bytes:
    """Make the thumbnail of a place, in a worker, which brings its chat processor; see `Thumbnails.get`."""
    if is_file(id, path, None):
        # A large JPEG is decoded at a fraction of its size.
        return encode_thumbnail(decode_image(ImageRef(Path(path)), min_side=size), size)
    return encode_thumbnail(load_image(id, path, None, roots), size)


def encode_thumbnail(image: Image.Image, size: int) -> bytes:
    """Reduce an RGB image, and encode it as a JPEG file."""
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Colors of small drawings suffer most where they are kept at half the size.
    subsampling = "4:2:0" if max(image.size) >= ThumbnailSize.SMALL else "4:4:4"
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=subsampling, optimize=True)
    return buffer.getvalue()
