"""Make small copies of images for HTML pages."""

import base64
import io

from PIL import Image

MAX_PNG_SIDE = 96  # pixels; images up to this size are embedded unchanged, to be enlarged without smoothing
THUMBNAIL_SIDE = 192  # pixels; larger images are reduced to this


def thumbnail(image: Image.Image) -> str:
    """Return a `data:` URI of an image, for a page or a JSON file: PNG of a small one, JPEG of a reduced one."""
    format_name = "png" if max(image.size) <= MAX_PNG_SIDE else "jpeg"
    reduced, file = image.copy(), io.BytesIO()
    reduced.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    reduced.save(file, format_name)
    return f"data:image/{format_name};base64,{base64.b64encode(file.getvalue()).decode()}"
