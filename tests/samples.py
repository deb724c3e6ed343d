"""Small things to put into files."""

import io

import numpy as np
from PIL import Image


def png(color: str, size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    """A small picture of one color, encoded."""
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, kind)
    return out.getvalue()


def noise(seed: int, width: int, height: int) -> Image.Image:
    """A picture of random values."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def unit(rows: int, dim: int, seed: int) -> np.ndarray:
    """Random unit vectors."""
    drawn = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
