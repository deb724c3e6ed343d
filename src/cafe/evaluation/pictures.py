"""Small copies of the pictures that records name."""

from cafe.content import ImageRef, open_image
from cafe.data import pictures


def thumbnail(ref: ImageRef) -> str:
    """A `data:` URI of a picture.

    Raises:
        CafeError: the picture is missing or damaged.
    """
    return pictures.thumbnail(open_image(ref))
