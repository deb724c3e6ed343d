"""The vector index: when it is built, and that its recall is measured on what it finds."""

import numpy as np
import pytest
from search_samples import index, unit_vectors, write_store

from cafe.index import generation, snapshot
from cafe.index import vector_index as module
from cafe.index.manifest import VectorIndex
from cafe.index.vector_index import build_vector_index, needs_vector_index, sample_queries


@pytest.mark.parametrize(
    ("index", "num_images", "is_needed"),
    [
        (None, 100, False),
        (None, 101, True),
        (VectorIndex(101, 8, 1.0), 150, False),
        (VectorIndex(101, 8, 1.0), 202, True),
        (VectorIndex(101, 8, 1.0), 50, False),
    ],
)
def test_an_index_is_built_beyond_a_size_and_again_when_the_collection_has_doubled(index, num_images, is_needed):
    assert needs_vector_index(index, num_images, max_exact=100) == is_needed


def test_the_recorded_recall_is_that_of_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_PARTITION", 30)  # 20 partitions
    monkeypatch.setattr(module, "NUM_PROBES", (1, 2))
    vectors = unit_vectors(600)
    store = write_store(tmp_path / "1", vectors)
    index = build_vector_index(store, 600)
    shares = []
    for query in sample_queries(store):
        truth = {f"key{number:03}" for number in np.argsort(-(vectors @ query))[:10].tolist()}
        shares.append(len(truth & set(store.nearest(query, 10, index.num_probes))) / 10)
    assert index.num_images == 600 and index.num_probes == 2
    assert 0.1 < index.recall < 0.95  # two of twenty partitions find some
    assert index.recall == pytest.approx(np.mean(shares), abs=0.01)


def test_more_partitions_are_read_until_the_recall_is_high(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_PARTITION", 30)
    monkeypatch.setattr(module, "NUM_PROBES", (1, 20, 64))
    index = build_vector_index(write_store(tmp_path / "1", unit_vectors(600)), 600)
    assert index.num_probes == 20 and index.recall >= module.MIN_RECALL


def test_a_large_collection_records_its_index_and_is_searched_by_it(tmp_path, scenes, random_base, monkeypatch):
    for place in (generation, snapshot):
        monkeypatch.setattr(place, "MAX_EXACT", 10)
    collection = index(tmp_path / "collection", random_base, scenes / "images" / "test")
    told = collection.info()["vector_index"]
    assert told["num_images"] == 24 and told["recall"] >= 0.9
    by_index = [hit.id for hit in collection.search("a red star", 5)]
    wide = collection.search("a red star", 5, min_width=64)
    monkeypatch.setattr(snapshot, "MAX_EXACT", 100)
    assert by_index == [hit.id for hit in collection.search("a red star", 5)] == [hit.id for hit in wide]
