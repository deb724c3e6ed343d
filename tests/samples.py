"""Small things to put into files."""

import io

from PIL import Image


def png(color: str, size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    """A small picture of one color, encoded."""
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, kind)
    return out.getvalue()
