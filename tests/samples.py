"""Small things to put into files."""

import io
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

# Any value that a JSON file can hold, with half characters, numbers too large for a float, and NaN.
ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def paths_in(value: Any) -> list[list[Any]]:
    """List the way to every value inside a document, by keys and numbers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [[], *([key, *rest] for key, inner in items for rest in paths_in(inner))]


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
