"""The records everything speaks in: what one side of a pair holds, a dialogue, and an example.

Images are references (a path, bytes, or a picture already in memory), decoded when they are needed by `open_image`.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.Image import Transpose

from cafe.errors import CafeError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs, in pixels
_TURNS = {  # what makes a picture upright, by its EXIF orientation
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@dataclass(frozen=True, eq=False)
class ImageRef:
    """An image not yet decoded: a file's path, encoded bytes, or a Pillow picture. Compared by identity."""

    source: Path | bytes | Image.Image

    def __str__(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else f"<{type(self.source).__name__}>"


Part = str | ImageRef


@dataclass(frozen=True)
class Content:
    """Text, images, or both interleaved, in reading order."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, value: Any) -> "Content":
        """Content from what people have at hand.

        Args:
            value: text (`str`), a picture (`PIL.Image`, `bytes`, `Path`), a mapping with "image" (or "images") and
                "text", or a sequence of these.

        Raises:
            CafeError: the value is none of these.
        """
        return value if isinstance(value, Content) else cls(tuple(_parts(value)))

    @property
    def images(self) -> list[ImageRef]:
        """The images, in reading order."""
        return [part for part in self.parts if isinstance(part, ImageRef)]

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


def _parts(value: Any) -> list[Part]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, ImageRef):
        return [value]
    if isinstance(value, (Path, bytes, Image.Image)):
        return [ImageRef(value)]
    if isinstance(value, dict):
        unknown = sorted(set(value) - {"image", "images", "text"})
        if unknown or not value:
            raise CafeError(
                f"Content takes the keys image, images and text, not {', '.join(unknown) or 'an empty mapping'}."
            )
        parts: list[Part] = []
        shown, text = value["image"] if "image" in value else value.get("images", []), value.get("text")
        for picture in shown if isinstance(shown, (list, tuple)) else [shown]:
            parts += _parts(Path(picture) if isinstance(picture, str) else picture)
        if text is not None and not isinstance(text, str):
            raise CafeError(f"Content's text should be a str, not a {type(text).__name__}.")
        return parts + ([text] if text else [])
    if isinstance(value, Sequence):
        return [part for item in value for part in _parts(item)]
    raise CafeError(f"Content cannot be made of a {type(value).__name__}: give text, a picture, or a mapping of both.")


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue."""

    role: Literal["user", "assistant"]
    content: Content


@dataclass(frozen=True)
class Dialogue:
    """Turns of user and assistant, in order; the assistant's tokens are supervised."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Pair:
    """Two contents that match, and hard negatives that only look like the target.

    `negative_scores` says how likely each of these matches after all (0 to 1), which makes it a soft target; empty
    where none does.
    """

    query: Content
    target: Content
    negatives: tuple[Content, ...] = ()
    negative_scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.negative_scores and len(self.negative_scores) != len(self.negatives):
            raise CafeError(
                f"there are {len(self.negatives)} negatives and {len(self.negative_scores)} scores of them."
            )
        if wrong := [score for score in self.negative_scores if not 0 <= score <= 1]:
            raise CafeError(f"a negative's score should be between 0 and 1, not {wrong[0]:g}.")


@dataclass(frozen=True)
class Example:
    """One training record: a pair trains contrast, a dialogue trains language, both train both.

    `source` names the file and record, for messages.
    """

    pair: Pair | None = None
    dialogue: Dialogue | None = None
    source: str = field(default="", compare=False)


def open_image(ref: ImageRef, max_pixels: int = MAX_PIXELS, enough: int | None = None) -> Image.Image:
    """Decodes an image completely, upright (EXIF orientation applied) and in RGB.

    Transparent pixels are laid over white; 16-bit pictures are scaled to 8 bits; palettes and CMYK are converted.

    Args:
        ref: where it is.
        max_pixels: more are refused before they are decoded.
        enough: a JPEG is decoded at a half, a quarter or an eighth of its size, which is faster, where this divides
            both sides (so that the shape stays exact) and leaves them so many pixels or more. None decodes all.

    Raises:
        CafeError: the file is missing, is no image, is damaged, or has more than `max_pixels` pixels.
    """
    if isinstance(ref.source, Image.Image):
        with decoding(ref):
            return _to_rgb(_upright(ref.source))
    with _opened(ref.source, max_pixels, enough) as image:
        return _to_rgb(_upright(image))


def open_pixels(
    ref: ImageRef, max_pixels: int = MAX_PIXELS, enough: int | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """What `open_image` decodes, in an array. A plain JPEG comes there by half the work where simplejpeg is installed.

    Pillow's decoder and simplejpeg's are the same, libjpeg-turbo, and so are the values.
    """
    if simplejpeg and not isinstance(ref.source, Image.Image):
        with _opened(ref.source, max_pixels, enough) as image:
            if image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(Base.Orientation, 1) == 1:
                data = ref.source if isinstance(ref.source, bytes) else ref.source.read_bytes()
                with suppress(ValueError):  # it is damaged, and Pillow says how
                    return simplejpeg.decode_jpeg(data, min_height=image.height, min_width=image.width)
    return np.array(open_image(ref, max_pixels, enough))  # a copy, which may be written to


@contextmanager
def _opened(source: Path | bytes, max_pixels: int, enough: int | None) -> Iterator[Image.Image]:
    """An encoded image before it is decoded, set to be decoded at the size that `open_image` tells of."""
    ref = ImageRef(source)  # for messages
    with decoding(ref), Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if image.width * image.height > max_pixels:
            raise CafeError(f"The image {ref} has {image.width} x {image.height} pixels, over {max_pixels:,}.")
        for part in (8, 4, 2):
            whole = not image.width % part and not image.height % part
            if enough and whole and min(image.size) >= part * enough:
                image.draft(None, (image.width // part, image.height // part))
                break
        yield image


@contextmanager
def decoding(ref: ImageRef) -> Iterator[None]:
    """Within it, whatever is wrong with an image is one sentence that names it."""
    try:
        yield
    except (CafeError, MemoryError):
        raise
    except FileNotFoundError:
        raise CafeError(f"The image {ref} does not exist.") from None
    except UnidentifiedImageError:  # which names bytes by their place in memory, another in each run
        raise CafeError(f"The image {ref} cannot be decoded: it is of no kind that Pillow knows.") from None
    except Exception as error:  # each of Pillow's decoders has its own kinds: RuntimeError (AVIF), struct.error (EXIF)
        raise CafeError(f"The image {ref} cannot be decoded: {error}.") from error


def _upright(image: Image.Image) -> Image.Image:
    # Not by Pillow's `exif_transpose`, which writes all other EXIF tags anew and fails where one is damaged.
    image.load()  # first: a TIFF is turned by that
    turn = _TURNS.get(image.getexif().get(Base.Orientation, 1))
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
