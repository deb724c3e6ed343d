"""When an image was taken, from the EXIF data of real files."""

import io
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import IFD, Base

from cafe.images.dates import date_taken


def saved(kind="JPEG", original=None, changed=None, exif=None):
    """An image with EXIF dates, written and opened again."""
    data = Image.Exif()
    data[Base.Make] = "a camera"  # without this Pillow takes the data for empty
    if original is not None:
        data.get_ifd(IFD.Exif)[Base.DateTimeOriginal] = original
    if changed is not None:
        data[Base.DateTime] = changed
    out = io.BytesIO()
    Image.new("RGB", (8, 6)).save(out, kind, exif=data if exif is None else exif)
    return Image.open(io.BytesIO(out.getvalue()))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_shutters_time_is_read(kind):
    assert date_taken(saved(kind, "2024:05:31 18:04:59")) == datetime(2024, 5, 31, 18, 4, 59)


@pytest.mark.parametrize(
    ("original", "changed", "date"),
    [
        ("2024:05:31 18:00:00", "2025:01:01 00:00:00", datetime(2024, 5, 31, 18)),
        (None, "2025:01:01 00:00:00", datetime(2025, 1, 1)),
        ("0000:00:00 00:00:00", "2025:01:01 00:00:00", datetime(2025, 1, 1)),
        ("    :  :     :  :  ", None, None),
        ("2024:02:30 00:00:00", None, None),
        ("yesterday", None, None),
        ("2024:05:31 18:00:00\0", None, datetime(2024, 5, 31, 18)),
        ("2024:05:31 18:00:00.123", None, datetime(2024, 5, 31, 18)),
        ("", "", None),
        (None, None, None),
    ],
)
def test_the_shutters_time_comes_before_that_of_the_last_change(original, changed, date):
    assert date_taken(saved(original=original, changed=changed)) == date


@given(st.binary(max_size=60))
def test_damaged_exif_data_has_no_date(data):
    assert date_taken(saved(exif=b"Exif\0\0" + data)) is None


def test_an_image_in_memory_has_no_date():
    assert date_taken(Image.new("RGB", (4, 4))) is None
