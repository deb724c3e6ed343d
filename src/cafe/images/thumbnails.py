"""Small copies of images, for pages."""

import base64
import io

from PIL import Image

PIXEL_ART_SIDE = 96  # pixels; smaller images are kept exactly, to be enlarged without smoothing
THUMBNAIL_SIDE = 192  # pixels; larger images are reduced to this


def thumbnail(image: Image.Image) -> str:
    """Encode a small copy of an image as a `data:` URI: PNG of a small image, JPEG of a larger one."""
    kind = "png" if max(image.size) <= PIXEL_ART_SIDE else "jpeg"
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    out = io.BytesIO()
    small.save(out, kind)
    encoded = base64.b64encode(out.getvalue()).decode()
    return f"data:image/{kind};base64,{encoded}"
