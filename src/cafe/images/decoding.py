"""Decode image files: completely, upright, in RGB, within a limit of pixels."""

import io
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

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_IMAGE_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs, in pixels
_UPRIGHT = 1
_EXIF_TRANSPOSES = {  # what turns an image upright, by its EXIF orientation
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def decode_image(ref: ImageRef, max_pixels: int = MAX_IMAGE_PIXELS, min_side: int | None = None) -> Image.Image:
    """Decode an image completely, upright (EXIF orientation applied) and in RGB.

    Transparent pixels are composited over white; 16-bit images are scaled to 8 bits; palettes and CMYK are converted.

    Args:
        ref: the image.
        max_pixels: larger images are refused before they are decoded.
        min_side: decode a JPEG at a half, a quarter or an eighth of its size, which is faster, where that divides both
            sides (so that the shape stays exact) and leaves them at least this many pixels. None decodes at full size.

    Raises:
        RecordError: the file is missing, is no image, is damaged, or has more than `max_pixels` pixels.
    """
    if isinstance(ref.source, Image.Image):
        with image_errors(ref):
            return _to_rgb(_apply_exif_orientation(ref.source))
    with _open_encoded(ref.source, max_pixels, min_side) as image:
        return _to_rgb(_apply_exif_orientation(image))


def decode_array(
    ref: ImageRef, max_pixels: int = MAX_IMAGE_PIXELS, min_side: int | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """Decode an image as `decode_image` does, into an array; plain JPEGs by simplejpeg, which does half the work.

    Pillow and simplejpeg both decode by libjpeg-turbo, so the values are the same.

    Args:
        ref: the image.
        max_pixels, min_side: see `decode_image`.

    Raises:
        RecordError: as `decode_image` says.
    """
    if simplejpeg and not isinstance(ref.source, Image.Image):
        with _open_encoded(ref.source, max_pixels, min_side) as image:
            pixels = _decode_plain_jpeg(ref.source, image)
        if pixels is not None:
            return pixels
    return np.array(decode_image(ref, max_pixels, min_side))  # a copy, because Pillow's own memory is read-only


def _decode_plain_jpeg(source: Path | bytes, image: Image.Image) -> UInt8[np.ndarray, "height width 3"] | None:
    """Decode a file by simplejpeg at the size that `image` is set to; None if it is no plain JPEG or is damaged."""
    if not _is_plain_jpeg(image):
        return None
    data = source.read_bytes() if isinstance(source, Path) else source
    with suppress(ValueError):  # a damaged file, for which Pillow has the better message
        pixels: UInt8[np.ndarray, "height width 3"] = simplejpeg.decode_jpeg(
            data, min_height=image.height, min_width=image.width
        )
        return pixels
    return None


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Return whether an image is an upright JPEG in RGB, which needs no conversion after decoding."""
    if (image.format, image.mode) != ("JPEG", "RGB"):
        return False
    return image.getexif().get(Base.Orientation, _UPRIGHT) == _UPRIGHT


@contextmanager
def _open_encoded(source: Path | bytes, max_pixels: int, min_side: int | None) -> Iterator[Image.Image]:
    """Open an encoded image that is not decoded yet, set to be decoded at a reduced size if `min_side` allows it.

    Raises:
        RecordError: the image has too many pixels, or anything else is wrong with it, also within the `with` block.
    """
    ref = ImageRef(source)  # names the image in messages
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with image_errors(ref), Image.open(file) as image:
        # Only the header is read so far, so that a decompression bomb is refused at no cost.
        if image.width * image.height > max_pixels:
            raise RecordError(f"The image {ref} has {image.width} x {image.height} pixels, over {max_pixels:,}.")
        if min_side:
            _reduce_jpeg(image, min_side)
        yield image


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
        raise RecordError(f"The image {ref} does not exist.") from None
    except UnidentifiedImageError:  # its message names bytes by their address, which differs between runs
        raise RecordError(f"The image {ref} cannot be decoded: Pillow does not know its format.") from None
    except Exception as error:  # Pillow's decoders raise RuntimeError (AVIF), struct.error (EXIF) and others
        raise RecordError(f"The image {ref} cannot be decoded: {error}.") from error


def _apply_exif_orientation(image: Image.Image) -> Image.Image:
    """Turn an image upright as its EXIF orientation says."""
    # Pillow's `exif_transpose` rewrites all other EXIF tags, and fails where one of them is damaged.
    image.load()  # comes first, because loading a TIFF turns it upright
    transpose = _EXIF_TRANSPOSES.get(image.getexif().get(Base.Orientation, _UPRIGHT))
    if transpose is None:
        return image
    upright = image.transpose(transpose)
    # Without the EXIF data, so that nobody turns it again.
    upright.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return upright


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, as it would look on a white page."""
    # 16 bits to 8: Pillow would clip them. Big-endian "I;16B" takes no `point` unless converted to "I" first.
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    # Alpha, whether a channel or a palette's transparent color: Pillow would drop it and show what lies below.
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer)
    if image.mode == "RGB":
        return image  # without the copy that `convert` makes
    return image.convert("RGB")
