"""Convert images of any mode to RGB, as they would look on a white page."""

from typing import Any

import numpy as np
from PIL import Image

_COLOR_TYPES = {"1": int, "L": int, "I;16": int, "RGB": tuple}  # of a transparent color, by the image's mode
# A PNG's transparent color is in the file's own bit depth, and Pillow decodes these depths to 8 bits.
_TO_8_BITS = {
    "1": lambda value: value * 255,
    "L;2": lambda value: value * 85,
    "L;4": lambda value: value * 17,
    "RGB;16B": lambda value: value >> 8,
}


def transparent_color(image: Image.Image) -> Any:
    """Return the color whose pixels are transparent, in an image that is not decoded yet; None if there is none.

    Palettes have transparency of another form, which `to_rgb` leaves to Pillow.
    """
    kind = _COLOR_TYPES.get(image.mode)
    color = image.info.get("transparency")
    if kind is None or not isinstance(color, kind):
        return None
    # Only an image that is not decoded yet tells its depth.
    tiles = getattr(image, "tile", None)
    depth = tiles[0][3] if tiles else image.mode
    scale = _TO_8_BITS.get(str(depth))
    if scale is None:
        return color
    return tuple(map(scale, color)) if isinstance(color, tuple) else scale(color)


def to_rgb(image: Image.Image, transparent: Any = None) -> Image.Image:
    """Convert an image of any mode to RGB, as it would look on a white page.

    Args:
        image: the image, decoded.
        transparent: the color whose pixels are transparent, as `transparent_color` found it; None for none.
    """
    if transparent is not None:
        return _fill_transparent(image, transparent)
    image = _to_8_bits(image)
    # Alpha, whether the last channel or a palette's transparent color: Pillow would drop it and show what lies below.
    has_alpha = image.getbands()[-1] in ("A", "a")
    if has_alpha or (image.mode == "P" and "transparency" in image.info):
        # Premultiplied gray converts to nothing but gray with alpha.
        layer = image.convert("LA") if image.mode == "La" else image
        layer = layer.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer)
    if image.mode == "RGB":
        return image  # without the copy that `convert` makes
    return image.convert("RGB")


def _fill_transparent(image: Image.Image, transparent: Any) -> Image.Image:
    """Convert an image to RGB, with white wherever it has the transparent color."""
    # Compared before 16 bits become 8, which would make other colors equal to it.
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    matches = pixels == np.asarray(transparent)
    if matches.ndim == 3:
        matches = matches.all(axis=-1)
    rgb = np.array(_to_8_bits(image).convert("RGB"))
    rgb[matches] = 255
    return Image.fromarray(rgb)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale integers of 16 bits and floating-point numbers to 8 bits; other images are returned unchanged."""
    # Pillow would clip them. Big-endian "I;16B" takes no `point` unless converted to "I" first.
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value / 257).convert("L")
    if image.mode == "F":
        return Image.fromarray(_scale_floats(np.asarray(image)))
    return image


def _scale_floats(values: np.ndarray) -> np.ndarray:
    """Scale floating-point gray values to bytes: they go to 1, to 255 or, as 16 bits do, to 65535."""
    values = np.nan_to_num(values)
    largest = values.max(initial=0)
    if largest <= 1:
        values = values * 255
    elif largest > 255:
        values = values / 257
    return values.clip(0, 255).round().astype(np.uint8)
