"""What a search has in memory: vectors in the order of the images, places, dates, and what filters leave."""

import os
from datetime import datetime

import numpy as np
import pytest
from search_samples import unit_vectors, write_snapshot, write_store

from cafe.index import snapshot as module
from cafe.index.filters import Filters
from cafe.index.snapshot import Snapshot

EVERYTHING = Filters().compile()


def test_vectors_are_in_the_order_of_images_whatever_the_order_of_rows(tmp_path):
    vectors = unit_vectors(30)
    store = write_store(tmp_path / "1", vectors)
    snapshot = Snapshot.read(store)
    order = [int(key.removeprefix("key")) for key in snapshot.images["key"].to_pylist()]
    np.testing.assert_array_equal(snapshot.vectors, vectors[order])
    some = np.array([20, 3, 11])
    np.testing.assert_array_equal(snapshot.vectors_of(some), vectors[order][some])
    assert len(snapshot) == 30


def test_vectors_of_a_large_collection_are_read_one_by_one(tmp_path, monkeypatch):
    snapshot = write_snapshot(tmp_path / "1", unit_vectors(30))
    expected = snapshot.vectors
    monkeypatch.setattr(module, "MAX_EXACT", 10)
    some = np.array([20, 3, 11])
    np.testing.assert_array_equal(snapshot.vectors_of(some), expected[some])


def test_an_image_without_a_place_is_not_there(tmp_path):
    store = write_store(tmp_path / "1", unit_vectors(4))
    store.remove(["/photos/2.png"])
    snapshot = Snapshot.read(store)
    assert list(snapshot.numbers) == ["key000", "key001", "key003"]
    assert snapshot.vectors.shape == (3, 16)


def test_an_empty_collection_can_be_read(tmp_path):
    snapshot = write_snapshot(tmp_path / "1", np.zeros((0, 16), np.float32))
    assert len(snapshot) == 0 and snapshot.vectors.shape == (0, 16) and snapshot.appearances.size == 0


def test_only_images_with_a_caption_have_a_captions_vector(tmp_path):
    captions = unit_vectors(2, seed=1)
    images = {number: {"caption": "a boat", "caption_vector": captions[row]} for row, number in enumerate((1, 3))}
    vectors, numbers = write_snapshot(tmp_path / "1", unit_vectors(4), images=images).caption_vectors
    order = np.argsort(numbers)
    assert numbers[order].tolist() == [1, 3]
    np.testing.assert_array_equal(vectors[order], captions)


def test_a_date_is_that_of_the_exif_data_or_else_of_the_file(tmp_path):
    taken_at = datetime(2024, 5, 31, 12)
    seconds = 1.6e9
    snapshot = write_snapshot(
        tmp_path / "1",
        unit_vectors(2),
        images={0: {"taken_at": taken_at}},
        places={number: {"mtime_ns": int(seconds * 10**9)} for number in (0, 1)},
    )
    dates = [snapshot.taken_at(number, places[0]) for number, places in enumerate(snapshot.places)]
    assert dates == [taken_at, datetime.fromtimestamp(seconds)]


def test_an_image_is_shown_where_it_passes_the_filters_and_still_is(tmp_path):
    there = tmp_path / "Italy" / "there.png"
    there.parent.mkdir()
    there.touch()
    places = {
        0: {"id": "/gone/Italy/a.png", "path": "/gone/Italy/a.png", "key": "key000"},
        1: {"id": str(there), "path": str(there), "key": "key000"},
        2: {"id": "/gone/France/b.png", "path": "/gone/France/b.png", "key": "key000"},
    }
    snapshot = write_snapshot(tmp_path / "1", unit_vectors(3), places=places)
    assert snapshot.place_of(0, EVERYTHING).path == str(there)
    assert snapshot.place_of(0, Filters(folder="France").compile()).path == "/gone/France/b.png"
    os.remove(there)
    assert snapshot.place_of(0, Filters(folder="Italy").compile()).path == "/gone/Italy/a.png"


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(), None),
        (Filters(min_width=800), [1]),
        (Filters(folder="photos", after="2024"), [2]),
        (Filters(where=("license=cc0",)), [0, 1]),
        (Filters(where=("license=cc0",), min_width=800), [1]),
        (Filters(folder="nowhere"), []),
    ],
)
def test_filters_leave_the_images_of_which_any_place_passes(filters, expected, tmp_path):
    snapshot = write_snapshot(
        tmp_path / "1",
        unit_vectors(3),
        images={1: {"width": 900}, 2: {"taken_at": datetime(2024, 1, 1)}},
        places={number: {"columns": '{"license": "cc0"}'} for number in (0, 1)},
    )
    allowed = snapshot.allowed(filters.compile())
    assert (None if allowed is None else np.flatnonzero(allowed).tolist()) == expected
