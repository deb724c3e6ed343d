"""The tables: rows come back as they were written, by key, whatever is in their texts."""

import shutil
from dataclasses import asdict

import numpy as np
import pytest
from collection_samples import as_nobody, full_disk, image_row, place
from samples import unit

from cafe.errors import CafeError
from cafe.index import store as store_module
from cafe.index.store import Store

DIM = 8
STRANGE = ["ünï 日本", "a\nb", 'it\'s "it"', "<img src=x onerror=alert(1)>", "\\'; DROP TABLE--", "\x1b[2J", "'", ""]


@pytest.fixture
def store(tmp_path):
    (tmp_path / "1").mkdir()
    return Store.create(tmp_path / "1", DIM)


def keys(store):
    return sorted(store.read_images(["key"])["key"].to_pylist())


def test_rows_come_back_as_they_were_written(store):
    vectors = unit(3, DIM, 0)
    rows = [image_row("a", vectors[0]), image_row("b", vectors[1], caption="a dog", caption_vector=vectors[2])]
    there = [place("/a", "a"), place("/b#page=2", "b", path="/b", page=2, columns='{"x": 1}'), place("/c", None)]
    store.write(rows, there)
    read = {row["key"]: row for row in store.read_images(["key", "vector", "caption", "caption_vector"]).to_pylist()}
    assert read["a"]["vector"] == vectors[0].astype(np.float16).tolist()
    assert read["a"]["caption_vector"] is None and read["a"]["caption"] is None
    assert read["b"]["caption_vector"] == vectors[2].astype(np.float16).tolist()
    assert sorted(store.read_places().to_pylist(), key=lambda row: row["id"]) == [asdict(row) for row in there]


def test_what_is_written_twice_is_there_once_as_it_was_last(store):
    store.write([image_row("a", unit(1, DIM, 0)[0])], [place("/a", "a")])
    store.write([image_row("a", unit(1, DIM, 1)[0])], [place("/a", "a", size=5)])
    [row], [there] = store.read_images(["key", "vector"]).to_pylist(), store.read_places().to_pylist()
    assert row["vector"] == unit(1, DIM, 1)[0].astype(np.float16).tolist() and there["size"] == 5


def test_places_of_any_name_are_written_and_removed(store):
    names = [f"/{text}" for text in STRANGE]
    store.write([], [place(name, None, error=text) for name, text in zip(names, STRANGE, strict=True)])
    assert {row["id"]: row["error"] for row in store.read_places().to_pylist()} == dict(
        zip(names, STRANGE, strict=True)
    )
    for left in range(len(names), 0, -1):
        assert store.places.count_rows() == left
        store.remove([names[left - 1]])
    assert store.places.count_rows() == 0


def test_many_places_are_removed_and_many_images_read_in_parts(store, monkeypatch):
    monkeypatch.setattr(store_module, "KEYS_PER_CONDITION", 3)
    names = [f"{number}" for number in range(10)]
    vectors = unit(10, DIM, 0)
    store.write(
        [image_row(name, vector) for name, vector in zip(names, vectors, strict=True)], [place(n, n) for n in names]
    )
    assert sorted(store.read_images(["key"], names[2:])["key"].to_pylist()) == names[2:]
    assert store.read_images(["key"], [])["key"].to_pylist() == []
    store.remove(names[:8])
    assert store.remove_images_without_places() == 8
    assert keys(store) == ["8", "9"] and store.remove_images_without_places() == 0


def test_half_characters_in_a_text_are_replaced(store):
    store.write([image_row("a", unit(1, DIM, 0)[0], text="x\ud800")], [place("/a", None, error="y\udfff")])
    assert store.read_images(["text"])["text"].to_pylist() == ["x?"]
    assert store.read_places(["error"])["error"].to_pylist() == ["y?"]


def test_every_write_changes_the_version_and_compaction_keeps_the_rows(store, monkeypatch):
    monkeypatch.setattr(store_module, "COMMITS_BETWEEN_COMPACTIONS", 4)
    monkeypatch.setattr(store_module, "MIN_ROWS_FOR_KEY_INDEX", 6)
    vectors, versions = unit(12, DIM, 0), [store.version]
    for number in range(12):
        store.write([image_row(f"{number:02}", vectors[number])], [place(f"/{number}", f"{number:02}")])
        versions.append(store.version)
    assert len(set(versions)) == 13
    assert keys(store) == [f"{number:02}" for number in range(12)]
    store.write([image_row("05", vectors[0])], [])  # by the index of keys now
    assert len(keys(store)) == 12
    table = store.read_images(["key", "vector"], ["05"])
    assert table["vector"].to_pylist() == [vectors[0].astype(np.float16).tolist()]


def test_nearest_is_the_order_of_a_plain_product(store):
    vectors = unit(40, DIM, 0)
    store.write([image_row(f"{number:02}", vector) for number, vector in enumerate(vectors)], [])
    query = unit(1, DIM, 9)[0]
    by_hand = np.argsort(-(vectors.astype(np.float16).astype(np.float32) @ query))[:5]
    assert store.nearest(query, 5) == store.nearest(query, 5, exact=True) == [f"{number:02}" for number in by_hand]
    assert store.read_sample_vectors(7).shape == (7, DIM) and store.read_sample_vectors(100).shape == (40, DIM)


def test_a_full_disk_is_one_clear_error_and_what_was_written_stays(store):
    store.write([image_row("a", unit(1, DIM, 0)[0])], [place("/a", "a")])
    with full_disk(), pytest.raises(CafeError, match=r"The disk of the collection .* is full: free some space"):
        store.write([image_row("b", unit(1, DIM, 1)[0])], [place("/b", "b")])
    assert keys(store) == ["a"]
    store.write([image_row("b", unit(1, DIM, 1)[0])], [place("/b", "b")])
    assert keys(Store(store.directory, DIM)) == ["a", "b"]


def test_a_damaged_table_is_one_clear_error_wherever_it_is_damaged(store):
    store.write([image_row("a", unit(1, DIM, 0)[0])], [place("/a", "a")])
    files = [file for file in store.directory.rglob("*") if file.is_file()]
    assert len(files) >= 6
    for file in files:
        data = file.read_bytes()
        for damage in (b"", data[: len(data) // 2], bytes(len(data)), data[::-1], None):
            if damage is None:
                file.unlink()
            else:
                file.write_bytes(damage)
            try:
                damaged = Store(store.directory, DIM)
                damaged.read_images(["key", "vector"])
                damaged.read_places()
            except CafeError as error:
                assert str(store.directory.parent) in str(error)
        file.write_bytes(data)
    assert keys(Store(store.directory, DIM)) == ["a"]
    for damage in ("images.lance", "places.lance"):
        shutil.rmtree(store.directory / damage)
        with pytest.raises(CafeError, match="is damaged or cannot be read"):
            Store(store.directory, DIM)


def test_tables_that_may_not_be_written_are_read_and_refused_for_writing(open_tmp_path):
    directory = open_tmp_path / "1"
    directory.mkdir()
    Store.create(directory, DIM).write([image_row("a", unit(1, DIM, 0)[0])], [place("/a", "a")])
    for folder in [directory, *directory.rglob("*")]:
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    with as_nobody():
        store = Store(directory, DIM)
        assert keys(store) == ["a"]
        with pytest.raises(CafeError, match="cannot be written to: permission denied"):
            store.write([image_row("b", unit(1, DIM, 1)[0])], [])
    for folder in [directory, *directory.rglob("*")]:
        folder.chmod(0o755)


def test_the_nearest_of_several_vectors_are_found_in_one_pass(store, monkeypatch):
    monkeypatch.setattr("cafe.index.store.ROWS_PER_BATCH", 7)
    vectors = unit(40, DIM, 0)
    store.write([image_row(f"{number:02}", vector) for number, vector in enumerate(vectors)], [])
    queries = unit(3, DIM, 1)
    by_hand = np.argsort(-(queries @ vectors.T), axis=1)[:, :5]
    assert store.nearest_of_all(queries, 5) == [[f"{number:02}" for number in row] for row in by_hand.tolist()]
