"""What is told about a collection: names and ids, whatever files are called, and never where they are."""

import os
from dataclasses import replace

import pytest
from collection_samples import add, write_images
from samples import noise

from cafe.index.collection import Collection
from cafe.index.filters import Filters
from cafe.model import Cafe
from cafe.serving.gallery import GalleryReader

ALL = Filters().compile()


@pytest.fixture(scope="module")
def model(random_base):
    return Cafe.load(random_base)


@pytest.fixture
def collection(tmp_path, model):
    return Collection.open(tmp_path / "gallery", model)


def read(collection):
    return GalleryReader().read(collection)


def described(gallery):
    """What is told of every image, by its name."""
    hits = gallery.latest(ALL, 100, "name")
    return {found.name: found for found in (gallery.describe(hit, None) for hit in hits)}

    return Filters().compile()


def test_an_image_is_found_again_by_its_id_and_by_nothing_else(collection, tmp_path):
    paths = write_images(tmp_path / "photos", 2)
    add(collection, tmp_path / "photos")
    gallery = read(collection)
    for name, found in described(gallery).items():
        assert os.path.basename(gallery.hit(found.id).path) == name
    for other in ("", "0" * 32, str(paths[0]), paths[0].name, "../" + paths[0].name):
        assert gallery.hit(other) is None


def test_folders_are_named_below_what_was_indexed(collection, tmp_path):
    write_images(tmp_path / "photos" / "2024" / "summer", 1, seed=1)
    write_images(tmp_path / "photos", 1, seed=2)
    noise(3, 20, 20).save(tmp_path / "single.png")
    add(collection, tmp_path / "photos")
    add(collection, tmp_path / "single.png")
    gallery = read(collection)
    assert sorted(found.folder for found in described(gallery).values()) == ["", "2024/summer"]
    assert described(gallery)["single.png"].folder == ""
    assert gallery.folders == ["2024", "photos", "summer"]


def test_names_that_are_no_text_can_be_sent(collection, tmp_path):
    write_images(tmp_path / "photos", 1)
    add(collection, tmp_path / "photos")
    gallery = read(collection)
    [hit] = gallery.latest(ALL, 1, "score")
    path = os.fsdecode(os.fsencode(tmp_path / "photos") + b"/half \x80.png")
    found = gallery.describe(replace(hit, path=path, id=path, caption="half \udc80"), 0.5)
    assert (found.name, found.caption) == ("half ?.png", "half ?")
    assert found.model_dump_json()


def test_columns_that_tell_where_files_are_are_left_out(collection, tmp_path):
    write_images(tmp_path / "photos", 1)
    add(collection, tmp_path / "photos")
    gallery = read(collection)
    [hit] = gallery.latest(ALL, 1, "score")
    columns = {"path": "/home/a/b.png", "url": "file:///home/a/b.png", "license": "cc-by", "year": 2024}
    assert gallery.describe(replace(hit, columns=columns), 0.5).columns == {"license": "cc-by", "year": 2024}


def test_it_is_read_again_once_something_was_written(collection, tmp_path):
    write_images(tmp_path / "photos", 2)
    add(collection, tmp_path / "photos")
    reader = GalleryReader()
    first = reader.read(collection)
    assert reader.read(collection) is first
    write_images(tmp_path / "photos", 3)
    add(collection, tmp_path / "photos")
    assert len(reader.read(collection).snapshot) == 3


def test_an_empty_collection_has_no_days(collection, tmp_path):
    (tmp_path / "photos").mkdir()
    collection.add(tmp_path / "photos")
    gallery = read(collection)
    assert gallery.dates is None and not described(gallery)
