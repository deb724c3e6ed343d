"""Decode image files: completely, upright, in RGB, within limits of size."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.Image import Transpose

from cafe.content import ImageRef
from cafe.errors import CafeError, RecordError
from cafe.images.files import check_size, read_image_file
from cafe.images.metadata import drop_metadata, hide_exif
from cafe.images.pixels import to_rgb, transparent_color
from cafe.utils.text import shorten

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# The only formats that are ever opened, by Pillow's names. Others can run programs (EPS) or read other files. HEIF and
# JXL are read where a plugin of Pillow's does.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "HEIF", "JXL")
_FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000 or PPM"
_UPRIGHT = 1
_FIRST_TURNED = 5  # of the orientations in which width and height change places
_EXIF_TRANSPOSES = {  # what turns an image upright, by its EXIF orientation
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def decode_image(ref: ImageRef, min_side: int | None = None) -> Image.Image:
    """Decode an image completely, upright (EXIF orientation applied) and in RGB.

    Transparent pixels are composited over white; 16-bit images and floating-point numbers are scaled to 8 bits;
    palettes and CMYK are converted.

    Args:
        ref: the image.
        min_side: decode a JPEG at a half, a quarter or an eighth of its size, which is faster, where that divides both
            sides (so that the shape stays exact) and leaves them at least this many pixels. None decodes at full size.

    Raises:
        RecordError: the file is missing, is no image, is damaged, or is larger than the limits of `ref`.
    """
    if isinstance(ref.source, Image.Image):
        with image_errors(ref):
            _check_image(ref, ref.source)
            return _decode(ref.source)
    with open_encoded(ref, min_side) as (image, _):
        return _decode(image)


def decode_array(ref: ImageRef, min_side: int | None = None) -> UInt8[np.ndarray, "height width 3"]:
    """Decode an image as `decode_image` does, into an array; plain JPEGs by simplejpeg, which does half the work.

    Pillow and simplejpeg both decode by libjpeg-turbo, so the values are the same.

    Args:
        ref: the image.
        min_side: see `decode_image`.

    Raises:
        RecordError: as `decode_image` says.
    """
    if isinstance(ref.source, Image.Image):
        return np.array(decode_image(ref))  # a copy, because Pillow's own memory is read-only
    with open_encoded(ref, min_side) as (image, data):
        pixels = _decode_plain_jpeg(image, data)
        return np.array(_decode(image)) if pixels is None else pixels


@contextmanager
def open_encoded(ref: ImageRef, min_side: int | None = None) -> Iterator[tuple[Image.Image, bytes]]:
    """Open a file or encoded bytes, of which only the header is decoded yet, and return them with the bytes.

    Args:
        ref: the image.
        min_side: have it decoded at a reduced size, see `decode_image`.

    Raises:
        RecordError: the image is too large, or anything else is wrong with it, also within the `with` block.
    """
    with image_errors(ref):
        data = _encoded_bytes(ref)
        with _open(drop_metadata(data)) as image:
            # Only the header is decoded so far, so that a decompression bomb is refused at no cost.
            _check_image(ref, image)
            if image.width * image.height > ref.limits.max_pixels:
                raise RecordError(
                    f"The image {ref} has {image.width} x {image.height} pixels, over the limit of "
                    f"{ref.limits.max_pixels:,} (data.max_image_pixels)."
                )
            if min_side:
                _reduce_jpeg(image, min_side)
            yield image, data


def _open(data: bytes) -> Image.Image:
    """Open an encoded image of one of the formats that are read, whatever its file is called."""
    Image.init()  # otherwise Pillow knows the most frequent formats alone
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except ValueError as error:
        if "Exif" not in str(error):
            raise
        return Image.open(io.BytesIO(hide_exif(data)), formats=formats)


def _encoded_bytes(ref: ImageRef) -> bytes:
    """Return the bytes of an image, within its limit."""
    if isinstance(ref.source, Path):
        return read_image_file(ref.source, ref.limits.max_bytes)
    if not isinstance(ref.source, bytes):
        raise TypeError(f"{ref} is not encoded")
    check_size(ref, len(ref.source), ref.limits.max_bytes)
    return ref.source


def _check_image(ref: ImageRef, image: Image.Image) -> None:
    """Make sure that an image has pixels, and is not one that Pillow has opened but must not load.

    Raises:
        RecordError: it does not.
    """
    if not image.width or not image.height:
        raise RecordError(f"The image {ref} has {image.width} x {image.height} pixels: there is nothing to see.")
    # An image in memory that was not opened from a file has no format; MPO is a JPEG with several images.
    if image.format and image.format not in (*FORMATS, "MPO"):
        raise RecordError(f"The image {ref} is of the format {image.format}, not {_FORMAT_NAMES}.")


def _decode(image: Image.Image) -> Image.Image:
    """Decode an opened image, upright and in RGB."""
    transparent = transparent_color(image)  # comes first, because a decoded image does not tell its depth
    if transparent is not None:
        image.info["transparency"] = transparent  # for the next time, where the image is one in memory
    return to_rgb(_apply_exif_orientation(image), transparent)


def _decode_plain_jpeg(image: Image.Image, data: bytes) -> UInt8[np.ndarray, "height width 3"] | None:
    """Decode a file by simplejpeg at the size that `image` is set to; None if it is no plain JPEG or is damaged."""
    if not simplejpeg or not _is_plain_jpeg(image):
        return None
    with suppress(ValueError):  # a damaged file, for which Pillow has the better message
        pixels: UInt8[np.ndarray, "height width 3"] = simplejpeg.decode_jpeg(
            data, min_height=image.height, min_width=image.width
        )
        return pixels
    return None


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Return whether an image is an upright JPEG in RGB, which needs no conversion after decoding."""
    return (image.format, image.mode) == ("JPEG", "RGB") and _orientation(image) == _UPRIGHT


def _reduce_jpeg(image: Image.Image, min_side: int) -> None:
    """Have a JPEG decoded at the smallest size that keeps its shape and at least `min_side` pixels a side."""
    # libjpeg decodes at these fractions from fewer coefficients. Other formats ignore `draft`.
    for factor in (8, 4, 2):
        divides = image.width % factor == image.height % factor == 0
        if divides and min(image.size) >= factor * min_side:
            image.draft(None, (image.width // factor, image.height // factor))
            return


@contextmanager
def image_errors(ref: ImageRef) -> Iterator[None]:
    """Turn whatever is wrong with an image into an error that names it.

    Raises:
        RecordError: something is wrong with it.
    """
    try:
        yield
    except (CafeError, MemoryError):  # neither says anything about the image
        raise
    except FileNotFoundError:
        raise RecordError(_missing(shorten(str(ref)))) from None
    except UnidentifiedImageError:  # its message names bytes by their address, which differs between runs
        raise RecordError(f"The image {shorten(str(ref))} cannot be decoded: it is no {_FORMAT_NAMES} file.") from None
    except Exception as error:  # Pillow's decoders raise RuntimeError (AVIF), struct.error (EXIF) and others
        reason = shorten(str(error)) or type(error).__name__
        raise RecordError(f"The image {shorten(str(ref))} cannot be decoded: {reason}.") from error


def _missing(name: str) -> str:
    """Say that an image's file does not exist; a URL that was made a path has lost a slash."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", name):
        return f"The image {name} is a URL, which is not taken here: give a path or the image's bytes."
    return f"The image {name} does not exist."


def _apply_exif_orientation(image: Image.Image) -> Image.Image:
    """Turn an image upright as its EXIF orientation says."""
    # Pillow's `exif_transpose` rewrites all other EXIF tags, and fails where one of them is damaged.
    image.load()  # comes first, because loading a TIFF turns it upright
    transpose = _EXIF_TRANSPOSES.get(_orientation(image))
    if transpose is None:
        return image
    upright = image.transpose(transpose)
    # Without the EXIF data, so that nobody turns it again.
    upright.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return upright


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the width and height that an opened image has once it is turned upright."""
    width, height = image.size
    return (height, width) if _orientation(image) >= _FIRST_TURNED else (width, height)


def _orientation(image: Image.Image) -> int:
    """Return an image's EXIF orientation; one whose EXIF data is damaged is upright."""
    try:
        orientation: int = image.getexif().get(Base.Orientation, _UPRIGHT)
    except Exception:  # SyntaxError and struct.error have been seen
        return _UPRIGHT
    return orientation
