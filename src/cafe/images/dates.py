"""When an image was taken, by its EXIF data."""

from contextlib import suppress
from datetime import datetime
from typing import Any

from PIL import Image
from PIL.ExifTags import IFD, Base

_FORMAT = "%Y:%m:%d %H:%M:%S"  # of all EXIF dates


def date_taken(image: Image.Image) -> datetime | None:
    """Return when an image was taken, in the camera's local time; None if its EXIF data does not say.

    Args:
        image: an opened image, of which only the header needs to be decoded.
    """
    try:
        exif = image.getexif()
        original = exif.get_ifd(IFD.Exif).get(Base.DateTimeOriginal)
    except Exception:  # damaged EXIF data: SyntaxError and struct.error have been seen
        return None
    # The first is when the shutter was released, the second when the file was last changed, by an editor for example.
    for value in (original, exif.get(Base.DateTime)):
        date = _parse(value)
        if date is not None:
            return date
    return None


def _parse(value: Any) -> datetime | None:
    """Parse an EXIF date; cameras whose clock was never set write zeros or spaces."""
    with suppress(ValueError, TypeError):
        return datetime.strptime(str(value).strip("\0 ")[:19], _FORMAT)
    return None
