"""Pictures as records name them, their places in a text, and small copies of them as text."""

import base64
import binascii
import re
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from cafe.content import Content, ImageRef, Part
from cafe.data.files import file_errors, is_url, join, read
from cafe.data.source import Source
from cafe.errors import CafeError

IMAGE_TOKEN = "<image>"  # where an image stands in a text
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2", ".avif")
_VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
# The first characters of JPEG, PNG, GIF and WebP files in base64. A path to a picture has a dot; base64 has none.
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/=\s]+")


def is_image_name(name: str) -> bool:
    """Whether a file's name is that of a picture."""
    return name.lower().endswith(_SUFFIXES)


def image_refs(value: Any, source: Source) -> list[ImageRef]:
    """The pictures that a record's field stands for.

    It may be a path or URL (relative to the source's folder of images), base64 with or without `data:` before it,
    encoded bytes, a mapping of "bytes" and "path" (as the datasets library keeps them), a folder, or a list of these.
    Lists and folders are thinned to `source.frames`. Pictures on an object store are fetched here, so in a worker.

    Raises:
        CafeError: it is none of these, or cannot be fetched.
    """
    if value is None or (isinstance(value, (str, bytes)) and not value):
        return []
    if isinstance(value, (bytes, Image.Image)):
        return [ImageRef(value)]
    if isinstance(value, dict):
        return image_refs(value.get("bytes") or value.get("path"), source)
    if isinstance(value, (list, tuple)):
        return subsample([ref for item in value for ref in image_refs(item, source)], source.max_frames)
    if not isinstance(value, str):
        raise CafeError(f"a picture is a {type(value).__name__} and should be a path, bytes or base64.")
    if value.startswith("data:") or _BASE64.fullmatch(value[:1000]):
        return [ImageRef(_decode(value.partition(",")[2] if value.startswith("data:") else value))]
    name = join(source.folder, value)
    if name.lower().endswith(_VIDEOS):
        raise CafeError(f"{value} is a video, and no decoder is here: give a folder or a list of its frames.")
    if not Path(name).suffix and (frames := list_frames(name)):
        return subsample(frames, source.max_frames)
    return [_ref(name)]


def subsample(refs: list[ImageRef], most: int | None) -> list[ImageRef]:
    """At most so many of them, from the middles of equal stretches."""
    if most is None or len(refs) <= most:
        return refs
    return [refs[int((number + 0.5) * len(refs) / most)] for number in range(most)]


def _ref(name: str) -> ImageRef:
    return ImageRef(read(name) if is_url(name) else Path(name))


def list_frames(name: str) -> list[ImageRef]:
    """The pictures of a folder, in the order of their names and of the numbers in them; none if it is no folder.

    Raises:
        CafeError: it is a folder and holds no pictures, or cannot be looked into.
    """
    with file_errors(name):
        fs, path = fsspec.url_to_fs(name)
        if not fs.isdir(path):
            return []
        found = [fs.unstrip_protocol(file) if is_url(name) else file for file in fs.ls(path, detail=False)]
    frames = [str(file) for file in found if is_image_name(str(file))]
    if not frames:
        raise CafeError(f"The folder {name} holds no pictures.")
    return [_ref(file) for file in sorted(frames, key=_natural)]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise CafeError(f"a picture is not valid base64: {error}.") from None


def interleave(text: str, waiting: list[ImageRef], token: str | re.Pattern[str] = IMAGE_TOKEN) -> list[Part]:
    """A text with pictures at its marks, taken from the front of `waiting`.

    Raises:
        CafeError: there are more marks than pictures.
    """
    first, *others = text.split(token) if isinstance(token, str) else token.split(text)
    if len(others) > len(waiting):
        raise CafeError(f"a text shows {len(others)} images and only {len(waiting)} are left.")
    parts: list[Part] = [first.strip("\n")] if first.strip() else []
    for words in others:
        parts.append(waiting.pop(0))
        if words.strip():
            parts.append(words.strip("\n"))
    return parts


def place_images(text: str, refs: list[ImageRef], token: str | re.Pattern[str] = IMAGE_TOKEN) -> Content:
    """A text and its pictures: each at its mark; those without one come first.

    Raises:
        CafeError: there are more marks than pictures.
    """
    waiting = list(refs)
    parts = interleave(text, waiting, token)
    return Content((*waiting, *parts))
