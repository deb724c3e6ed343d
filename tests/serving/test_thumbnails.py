"""Thumbnails: of the right size, of the file as it is now, and with nothing of it but its pixels."""

import io
import os
from datetime import datetime

import pytest
from PIL import Image
from PIL.ExifTags import Base

from cafe.errors import RecordError
from cafe.index.searching import Hit
from cafe.model import Cafe
from cafe.serving.image_workers import ImageWorkers
from cafe.serving.lru import Lru
from cafe.serving.thumbnails import read_thumbnail


@pytest.fixture(scope="module")
def images(random_base):
    """Workers in this process."""
    workers = ImageWorkers(Cafe.load(random_base).chat_processor, num_workers=0)
    yield workers
    workers.close()


@pytest.fixture
def read(images, tmp_path):
    """A function that returns the thumbnail of a file in the folder."""
    kept = Lru(2**20)

    def thumbnail(name, size=256):
        path = str(tmp_path / name)
        hit = Hit(1.0, 1.0, path, None, None, "", datetime(2024, 5, 31), 1, 1, {}, "k", path)
        image = Image.open(io.BytesIO(read_thumbnail(hit, size, images, (), kept)))
        image.load()
        return image

    return thumbnail


@pytest.mark.parametrize(
    ("size", "expected"), [((3000, 1000), (256, 85)), ((100, 900), (28, 256)), ((40, 30), (40, 30)), ((1, 1), (1, 1))]
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_the_longer_side_is_as_long_as_wanted(read, tmp_path, size, expected, suffix):
    Image.new("RGB", size, "orange").save(tmp_path / f"a.{suffix}")
    assert read(f"a.{suffix}").size == expected


def test_it_is_upright_and_has_no_metadata(read, tmp_path):
    exif = Image.Exif()
    exif[Base.Orientation] = 6  # turned by a quarter
    exif[Base.Artist] = "somebody"
    Image.new("RGB", (600, 300), "orange").save(tmp_path / "a.jpg", exif=exif, comment=b"a secret")
    thumbnail = read("a.jpg")
    assert thumbnail.size == (128, 256)
    assert not thumbnail.getexif() and "comment" not in thumbnail.info


def test_a_file_that_has_changed_is_drawn_again(read, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 40), "red").save(path)
    assert read("a.png").getpixel((20, 20))[0] > 240
    Image.new("RGB", (40, 40), "black").save(path)
    os.utime(path, ns=(1, 1))
    assert read("a.png").getpixel((20, 20))[0] < 15


def test_what_is_no_image_is_an_error(read, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(RecordError):
        read("a.png")
    with pytest.raises(FileNotFoundError):
        read("missing.png")
