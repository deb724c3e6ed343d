"""Small copies of images for pages."""

import base64
import io

from PIL import Image

PIXEL_ART = 96  # pixels; smaller pictures are shown as they are, to be enlarged without smoothing
THUMBNAIL_SIDE = 192  # pixels; larger pictures are shown reduced to this


def thumbnail(image: Image.Image) -> str:
    """A `data:` URI of a picture, for a page or a JSON file: PNG of a small one, JPEG of a reduced one."""
    small, out = image.copy(), io.BytesIO()
    kind = "png" if max(image.size) <= PIXEL_ART else "jpeg"
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    small.save(out, kind)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
