"""Draw each concept by each hand, as small pictures on a transparent ground, and augment them."""

import io
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import resvg_py
from jaxtyping import UInt8
from PIL import Image

from another_hand.concepts import Concept
from another_hand.packages import DRAWINGS, read_json

SIDE = 96  # pixels; drawings are only ever made smaller than this

Drawing = UInt8[np.ndarray, "side side 4"]


def draw(packages: Path, hand: str, concepts: Iterable[Concept]) -> dict[str, Drawing]:
    """Draw the concepts that a hand has, by name, as RGBA without premultiplied alpha."""
    icons = read_json(packages, DRAWINGS[hand], "icons.json")
    return {concept.name: _draw(icons, concept.icons[hand]) for concept in concepts if hand in concept.icons}


def _draw(icons: dict, name: str) -> Drawing:
    """Draw one icon of a set."""
    icon = resolve(icons, name)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">'
    return _render(f"{svg}{icon['body']}</svg>", round(SIDE * height / width))


@lru_cache(maxsize=4096)  # all of them, as every stage draws the same ones
def _render(svg: str, height: int) -> Drawing:
    """Render an icon `SIDE` pixels wide and `height` high, cut to what is drawn and centered on a square."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=height, skip_system_fonts=True)
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    # The longer side fills the square, so that no hand is known by its margins.
    scale = SIDE / max(image.size)
    image = image.resize([max(1, round(scale * side)) for side in image.size], Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(square)


def resolve(icons: dict, name: str) -> dict:
    """Return an icon of a set by its name or by an alias of it."""
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon: dict = icons["icons"][name]
    return icon
