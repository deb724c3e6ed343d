"""Paint a scene: 64 x 64 pixels, drawn shapes and real scanned digits, slightly jittered, on varying backgrounds.

The digits are the 1,797 scans of the UCI "optical recognition of handwritten digits" set that ships inside
scikit-learn. Scans whose index is a multiple of 4 are used in test images only.
"""

import math
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from cafe.scenes.world import COLORS, DIGITS, PLACES, Scene, Split, Thing

SIDE = 64  # pixels
_CELL = SIDE // 2
_SUPERSAMPLE = 4  # shapes are drawn this much larger, then reduced, for smooth edges
_TONE_LEVELS = {"dark": 20, "gray": 60, "light": 100}
_SIZE_PIXELS = {"small": (20.0, 22.0), "large": (28.0, 30.0)}


@cache
def digit_scans(digit: int, split: Split) -> list[np.ndarray]:
    """Return the 8 x 8 scans (float, 0 to 1) of a digit that a split may use."""
    data = load_digits()
    scans = []
    for index in np.flatnonzero(data.target == digit):
        scan_split = "test" if index % 4 == 0 else "train"
        if scan_split == split:
            scans.append(data.images[index] / 16.0)  # the set counts gray levels from 0 to 16
    return scans


def _background(scene: Scene, rng: Random) -> Image.Image:
    """Paint the texture and tone of a scene, with a slight tint and noise."""
    noise = np.random.default_rng(rng.getrandbits(32))
    level = _TONE_LEVELS[scene.tone] + rng.uniform(-10, 10)
    tint = np.array([rng.uniform(-8, 8) for _ in range(3)])
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    period = rng.choice((6, 8, 10))
    pattern = {
        "plain": np.zeros((SIDE, SIDE)),
        "striped": ((rows + columns) // period) % 2,
        "checkered": (rows // period + columns // period) % 2,
    }[scene.texture]
    # The noise is gray: the same for all colors of a pixel.
    pixels = level + 18 * pattern[..., None] + tint + noise.normal(0, 3, (SIDE, SIDE, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGB")


def _polygon(kind: str) -> list[tuple[float, float]]:
    """Return the outline of a polygonal shape inside the square from -1 to 1."""
    if kind == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if kind == "triangle":
        return [(0, -0.95), (0.95, 0.8), (-0.95, 0.8)]
    if kind == "diamond":
        return [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)]
    if kind == "star":  # its ten corners, far from the center and near it in turn
        return [
            (radius * math.sin(turn * math.pi / 5), -radius * math.cos(turn * math.pi / 5))
            for turn, radius in enumerate([1.0, 0.42] * 5)
        ]
    if kind == "cross":
        a, b = 0.32, 0.95  # half the width of an arm, and its length from the center
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    if kind == "heart":  # the usual parametric curve
        turns = [step * 2 * math.pi / 48 for step in range(48)]
        return [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
            )
            for t in turns
        ]
    raise ValueError(f"{kind!r} is not a polygonal shape")


def _stencil(thing: Thing, split: Split, pixels: float, rng: Random) -> Image.Image:
    """Draw the coverage (mode L, 0 to 255) of a thing, at the size it has in the image."""
    side = max(1, round(pixels))
    if thing.kind in DIGITS:
        scan = rng.choice(digit_scans(DIGITS.index(thing.kind), split))
        return Image.fromarray((scan * 255).astype(np.uint8), "L").resize((side, side), Image.Resampling.BICUBIC)
    # Pillow draws hard edges: draw large and average.
    big = side * _SUPERSAMPLE
    stencil = Image.new("L", (big, big), 0)
    pen = ImageDraw.Draw(stencil)
    if thing.kind in ("circle", "ring"):
        pen.ellipse((0, 0, big - 1, big - 1), fill=255)
        if thing.kind == "ring":
            pen.ellipse((big * 0.24, big * 0.24, big * 0.76, big * 0.76), fill=0)
    else:
        corners = [((x + 1) * big / 2, (y + 1) * big / 2) for x, y in _polygon(thing.kind)]
        pen.polygon(corners, fill=255)
    return stencil.resize((side, side), Image.Resampling.BOX)


def paint(scene: Scene) -> Image.Image:
    """Paint the image of a scene, RGB, 64 x 64. The same scene always gives the same pixels."""
    rng = Random(f"paint {scene.name}")
    image = _background(scene, rng)
    for thing in scene.things:
        pixels = rng.uniform(*_SIZE_PIXELS[thing.size])
        stencil = _stencil(thing, scene.split, pixels, rng)
        row, column = divmod(PLACES.index(thing.place), 2)
        # Centered in its quarter, but for a jitter of up to 2 pixels.
        slack = (_CELL - stencil.width) / 2
        left, top = (round(cell * _CELL + slack + rng.uniform(-1, 1) * min(slack, 2)) for cell in (column, row))
        image.paste(COLORS[thing.color], (left, top), stencil)
    return image


def crop_place(image: Image.Image, place: str) -> Image.Image:
    """Crop the quarter of an image that a place names."""
    row, column = divmod(PLACES.index(place), 2)
    return image.crop((column * _CELL, row * _CELL, (column + 1) * _CELL, (row + 1) * _CELL))
