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
_EXIF_TRANSPOSES = {  # what makes a picture upright, by its EXIF orientation
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def decode_image(ref: ImageRef, max_pixels: int = MAX_IMAGE_PIXELS, enough: int | None = None) -> Image.Image:
    """Decodes an image completely, upright (EXIF orientation applied) and in RGB.

    Transparent pixels are laid over white; 16-bit pictures are scaled to 8 bits; palettes and CMYK are converted.

    Args:
        ref: where it is.
        max_pixels: more are refused before they are decoded.
        enough: a JPEG is decoded at a half, a quarter or an eighth of its size, which is faster, where this divides
            both sides (so that the shape stays exact) and leaves them so many pixels or more. None decodes all.

    Raises:
        RecordError: the file is missing, is no image, is damaged, or has more than `max_pixels` pixels.
    """
    if isinstance(ref.source, Image.Image):
        with image_errors(ref):
            return _to_rgb(_apply_exif_orientation(ref.source))
    with _open_encoded(ref.source, max_pixels, enough) as image:
        return _to_rgb(_apply_exif_orientation(image))


def decode_array(
    ref: ImageRef, max_pixels: int = MAX_IMAGE_PIXELS, enough: int | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """What `decode_image` decodes, in an array. A plain JPEG comes there by half the work where simplejpeg is installed.

    Pillow's decoder and simplejpeg's are the same, libjpeg-turbo, and so are the values.
    """
    if simplejpeg and not isinstance(ref.source, Image.Image):
        with _open_encoded(ref.source, max_pixels, enough) as image:
            if image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(Base.Orientation, 1) == 1:
                data = ref.source if isinstance(ref.source, bytes) else ref.source.read_bytes()
                with suppress(ValueError):  # it is damaged, and Pillow says how
                    return simplejpeg.decode_jpeg(data, min_height=image.height, min_width=image.width)
    return np.array(decode_image(ref, max_pixels, enough))  # a copy, which may be written to


@contextmanager
def _open_encoded(source: Path | bytes, max_pixels: int, enough: int | None) -> Iterator[Image.Image]:
    """An encoded image before it is decoded, set to be decoded at the size that `decode_image` tells of."""
    ref = ImageRef(source)  # for messages
    with image_errors(ref), Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if image.width * image.height > max_pixels:
            raise RecordError(f"The image {ref} has {image.width} x {image.height} pixels, over {max_pixels:,}.")
        for part in (8, 4, 2):
            whole = not image.width % part and not image.height % part
            if enough and whole and min(image.size) >= part * enough:
                image.draft(None, (image.width // part, image.height // part))
                break
        yield image


@contextmanager
def image_errors(ref: ImageRef) -> Iterator[None]:
    """Within it, whatever is wrong with an image is one sentence that names it."""
    try:
        yield
    except (CafeError, MemoryError):
        raise
    except FileNotFoundError:
        raise RecordError(f"The image {ref} does not exist.") from None
    except UnidentifiedImageError:  # which names bytes by their place in memory, another in each run
        raise RecordError(f"The image {ref} cannot be decoded: it is of no kind that Pillow knows.") from None
    except Exception as error:  # each of Pillow's decoders has its own kinds: RuntimeError (AVIF), struct.error (EXIF)
        raise RecordError(f"The image {ref} cannot be decoded: {error}.") from error


def _apply_exif_orientation(image: Image.Image) -> Image.Image:
    # Not by Pillow's `exif_transpose`, which writes all other EXIF tags anew and fails where one is damaged.
    image.load()  # first: a TIFF is turned by that
    turn = _EXIF_TRANSPOSES.get(image.getexif().get(Base.Orientation, 1))
    if turn is None:
        return image
    upright = image.transpose(turn)
    upright.info = {key: value for key, value in image.info.items() if key == "transparency"}  # or it is turned again
    return upright


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16B" too, big-endian, of which Pillow takes no point but by way of "I"
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image if image.mode == "RGB" else image.convert("RGB")
