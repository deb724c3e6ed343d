"""Small copies of pictures, as text that a page or a JSON file can hold."""

import base64
import io

from cafe.content import ImageRef, open_image

PIXEL_ART = 96  # pixels; smaller pictures stay as they are, to be enlarged without smoothing
THUMBNAIL = 192  # pixels; larger pictures are reduced to this


def thumbnail(ref: ImageRef) -> str:
    """A `data:` URI of a picture: PNG of a small one, JPEG of a reduced one.

    Raises:
        CafeError: the picture is missing or damaged.
    """
    image = open_image(ref)
    kind = "png" if max(image.size) <= PIXEL_ART else "jpeg"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
