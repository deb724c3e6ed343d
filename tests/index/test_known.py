"""Which files need not be read again."""

import pytest
from collection_samples import image_row, place
from samples import unit

from cafe.index.known import Known
from cafe.index.store import Store
from cafe.index.walk import File

DIM = 4


@pytest.fixture
def store(tmp_path):
    (tmp_path / "1").mkdir()
    store = Store.create(tmp_path / "1", DIM)
    vectors = unit(3, DIM, 0)
    rows = [
        image_row("a", vectors[0], caption="a dog"), image_row("b", vectors[1]), image_row("p#1", vectors[2]),
    ]  # fmt: skip
    pages = [place("/p.pdf#page=1", "p#1", path="/p.pdf", page=1), place("/p.pdf#page=2", None, path="/p.pdf", page=2)]
    files = [place("/a", "a"), place("/b", "b"), place("/bad", None, error="bad"), place("/lost", "lost")]
    store.write(rows, [*files, *pages, place("/p.pdf", None)])
    return store


def test_a_file_is_current_if_neither_size_nor_time_changed(store):
    known = Known.read(store, captioned=False)
    assert known.is_current(File("/a", 1, 1)) and known.is_current(File("/bad", 1, 1))
    assert not known.is_current(File("/a", 2, 1)) and not known.is_current(File("/a", 1, 2))
    assert not known.is_current(File("/new", 1, 1))
    assert not known.is_current(File("/lost", 1, 1))  # its image is missing
    assert known.is_current(File("/p.pdf", 1, 1)) and known.ids_of("/p.pdf") == ["/p.pdf#page=1", "/p.pdf#page=2"]
    assert known.ids_of("/a") == ["/a"]
    assert known.sorted_keys().tolist() == [b"a", b"b", b"p#1"]


def test_where_captions_are_wanted_images_without_one_are_read_again(store):
    known = Known.read(store, captioned=True)
    assert known.is_current(File("/a", 1, 1)) and not known.is_current(File("/b", 1, 1))
    assert not known.is_current(File("/p.pdf", 1, 1))
    assert known.keys == {"a", "b", "p#1", "lost"} and known.sorted_keys().tolist() == [b"a"]


def test_an_empty_collection_knows_nothing(tmp_path):
    (tmp_path / "2").mkdir()
    known = Known.read(Store.create(tmp_path / "2", DIM), captioned=True)
    assert not known.places and known.sorted_keys().tolist() == [b""]
