"""Images as records name them, and where they stand in a text."""

import base64
import binascii
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from PIL import Image

from cafe.content import Content, ImageRef, Part
from cafe.data.files import file_errors, is_url, is_web, read
from cafe.data.source import Source
from cafe.data.trust import check_inside, is_in_store, is_trusted, resolve_image
from cafe.data.web import read_web
from cafe.errors import RecordError
from cafe.utils.text import shorten

Item = TypeVar("Item")

IMAGE_TOKEN = "<image>"  # where an image stands in a text
IMAGE_MARK = re.compile(IMAGE_TOKEN)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2", ".avif")
_VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
# The first bytes of the kinds that are read, to tell an image in base64 from a path.
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*"  # JPEG, PNG, GIF, WebP, BMP, TIFF
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51|....ftyp(?:avi|hei|mif|msf)",  # JPEG 2000, AVIF, HEIF
    re.DOTALL,
)
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+")
_MAX_DEPTH = 8  # of lists within lists
_LONGEST_PATH = 300  # characters; a longer text without a dot, a hyphen or the like is no path


def is_image_name(name: str) -> bool:
    """Return whether a file is an image by its name."""
    return name.lower().endswith(_SUFFIXES)


def image_refs(value: Any, source: Source, depth: int = 0) -> list[ImageRef]:
    """Return the images that a record's field stands for.

    It may be a path or URL (relative to the source's folder of images), base64 with or without `data:` before it,
    encoded bytes, a mapping of "bytes" and "path" (as the datasets library keeps them), a folder of frames, or a list
    of these. Lists and folders are subsampled to `source.max_frames`. Images on an object store are downloaded here,
    that is, in a worker. `cafe.data.trust` says which paths and URLs a record may name.

    Args:
        value: the field.
        source: the folder of its images, what its records may name, and how many frames of a video to take.
        depth: the number of lists and mappings around the value.

    Raises:
        RecordError: it is none of these.
        CafeError: it cannot be downloaded.
    """
    if depth > _MAX_DEPTH:
        raise RecordError(f"images are in more than {_MAX_DEPTH} lists.")
    match value:
        case None:
            return []
        case str() | bytes() if not value:  # CSV has no null
            return []
        case bytes() | Image.Image():
            return [ImageRef(value, source.image_limits)]
        case dict():
            return image_refs(value.get("bytes") or value.get("path"), source, depth + 1)
        case list() | tuple():
            refs = chain.from_iterable(image_refs(item, source, depth + 1) for item in value)
            return subsample(list(refs), source.max_frames)
        case str():
            return _refs_from_text(value, source)
    raise RecordError(f"an image should be a path, bytes or base64, not {type(value).__name__}.")


def _refs_from_text(text: str, source: Source) -> list[ImageRef]:
    """Return the images of a field that is a text: base64, a file or a folder of frames."""
    # Base64 first: joined with a folder, it would pass for a file's name.
    if text.startswith("data:"):
        return [ImageRef(_decode_base64(text.partition(",")[2]), source.image_limits)]
    if _is_base64(text):
        return [ImageRef(_decode_base64(text), source.image_limits)]
    if text.lower().endswith(_VIDEO_SUFFIXES):
        raise RecordError(
            f"{shorten(text)} is a video, which cannot be decoded: give a folder or a list of its frames."
        )
    name = resolve_image(text, source)
    # What has no suffix may be a folder, or a file that is named by its hash. There are no folders on the web.
    if not Path(name).suffix and not is_web(name):
        frames = list_frames(name)
        if frames:
            return [_file_ref(frame, source) for frame in subsample(frames, source.max_frames)]
    return [_file_ref(name, source)]


def _is_base64(text: str) -> bool:
    """Return whether a text is an image in base64.

    Raises:
        RecordError: it is base64 of nothing that is read.
    """
    # The beginning is enough: the rest is checked when it is decoded. The path of an image has a dot; base64 has none.
    start = text[:1000]
    if not _BASE64.fullmatch(start):
        return False
    letters = "".join(start.split())[:64]
    with suppress(binascii.Error):  # a path that base64 cannot be
        if _MAGIC.match(base64.b64decode(letters[: len(letters) // 4 * 4])):
            return True
    if len(text) > _LONGEST_PATH:
        raise RecordError(f"an image in base64 is of none of the kinds that are read: {text[:20]}...")
    return False


def _decode_base64(text: str) -> bytes:
    """Decode base64, whose lines may be broken anywhere.

    Raises:
        RecordError: it is not base64.
    """
    without_breaks = "".join(text.split())
    try:
        return base64.b64decode(without_breaks, validate=True)
    except binascii.Error as error:
        raise RecordError(f"an image is not valid base64: {error}.") from None


def subsample(items: list[Item], max_items: int | None) -> list[Item]:
    """Take at most so many items, evenly spaced: the middle of each of `max_items` equal stretches.

    Args:
        items: the items, such as the frames of a video.
        max_items: the most to take; None takes all.
    """
    if max_items is None or len(items) <= max_items:
        return items
    middles = [int((number + 0.5) * len(items) / max_items) for number in range(max_items)]
    return [items[middle] for middle in middles]


def list_frames(name: str) -> list[str]:
    """List the images of a folder, ordered by name and by the numbers in them; none if it is not a folder.

    Raises:
        RecordError: it is a folder without images.
        CafeError: it cannot be read.
    """
    if not is_url(name):
        name = str(find_unicode_variant(Path(name)))
    with file_errors(name):
        files = _list_store(name) if is_url(name) else _list_local(name)
    if files is None:
        return []
    frames = sorted(filter(is_image_name, files), key=_natural_key)
    if not frames:
        raise RecordError(f"The folder {shorten(name)} holds no images.")
    return frames


def _list_local(name: str) -> list[str] | None:
    """List the files of a local folder; None if it is none."""
    # Not through fsspec, to which a local name may mean something else: zip::a.
    if not os.path.isdir(name):
        return None
    return [os.path.join(name, file) for file in os.listdir(name)]


def _list_store(name: str) -> list[str] | None:
    """List the files of a folder on an object store; None if it is none."""
    fs, path = fsspec.url_to_fs(name)
    if not fs.isdir(path):
        return None
    # fsspec lists paths without their protocol.
    return [fs.unstrip_protocol(str(file)) for file in fs.ls(path, detail=False)]


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in a name by their value: frame2 comes before frame10."""
    key: list[tuple[int, str]] = []
    for piece in re.split(r"(\d+)", name):
        # Pairs, since a number and a text cannot be compared. -1 sorts text before numbers.
        key.append((int(piece), "") if piece.isdecimal() else (-1, piece))
    return key


def _file_ref(name: str, source: Source) -> ImageRef:
    """Refer to an image's file; one on an object store or on the web is downloaded, within the source's limits."""
    limits = source.image_limits
    if is_web(name):
        return ImageRef(read_web(name, limits.max_bytes, trust_host=is_in_store(name, source)), limits)
    if is_url(name):
        # One byte more than the limit shows that there are too many.
        return ImageRef(read(name, 0, limits.max_bytes + 1), limits)
    path = find_unicode_variant(Path(name))
    # A folder that a record may name can hold links to what it may not.
    if not is_trusted(source):
        check_inside(path, source)
    return ImageRef(path, limits)


def find_unicode_variant(path: Path) -> Path:
    """Return the path that exists under a name that looks the same, or the path itself if none does.

    Unicode writes an accented letter as one character (NFC) or as two (NFD), and some systems change one to the other.
    """
    if str(path).isascii() or os.path.exists(path):  # not `Path.exists`, which raises for a name that is too long
        return path
    folder = find_unicode_variant(path.parent)
    for form in ("NFC", "NFD"):
        variant = folder / unicodedata.normalize(form, path.name)
        if os.path.exists(variant):
            return variant
    return path


def assign_to_marks(num_marks: int, refs: list[ImageRef]) -> tuple[list[ImageRef], list[list[ImageRef]]]:
    """Return the images that come first and, for each mark, those that stand there. Their order stays.

    One mark stands for one image, or for all of them if there is no other. Where there are fewer marks than images
    otherwise, nothing says which image a mark is for: all come first.

    Raises:
        RecordError: there are more marks than images.
    """
    if num_marks > len(refs):
        raise RecordError(f"a text shows {num_marks} images and only {len(refs)} are there.")
    if num_marks == len(refs):
        return [], [[ref] for ref in refs]
    if num_marks == 1:
        return [], [refs]
    return refs, [[]] * num_marks


def interleave(text: str, runs: Iterator[list[ImageRef]], mark: re.Pattern[str] = IMAGE_MARK) -> list[Part]:
    """Split a text at its marks and put images there.

    Args:
        text: the text.
        runs: for each mark, of this text and then of others, the images that stand there.
        mark: matches a mark.
    """
    parts: list[Part] = []
    for index, piece in enumerate(mark.split(text)):
        # A mark stands before every piece but the first.
        if index:
            parts += next(runs)
        # Line breaks beside an image belong to the mark, as in "<image>\nWhat is it?"; chat templates add their own.
        if piece.strip():
            parts.append(piece.strip("\r\n"))
    return parts


def place_images(text: str, refs: list[ImageRef], mark: re.Pattern[str] = IMAGE_MARK) -> Content:
    """Put images at the marks of a text; those without a mark come first.

    Args:
        text: the text.
        refs: the images, in order.
        mark: matches a mark.

    Raises:
        RecordError: there are more marks than images.
    """
    first, runs = assign_to_marks(len(mark.findall(text)), refs)
    return Content((*first, *interleave(text, iter(runs), mark)))
