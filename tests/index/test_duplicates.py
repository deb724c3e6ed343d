"""Duplicates: copies, resized and recompressed ones are found; what is only similar is not."""

import shutil

import numpy as np
import pytest
from PIL import Image
from samples import noise
from search_samples import index, numbers_of, unit_vectors, write_snapshot

from cafe.images.appearance import NUM_BYTES
from cafe.index import duplicates as module
from cafe.index.duplicates import find_duplicates


def appearance(value):
    """An image of one gray."""
    return bytes([value]) * NUM_BYTES


def groups_of(snapshot, **options):
    return [numbers_of(group) for group in find_duplicates(snapshot, **options)]


def test_duplicates_have_similar_embeddings_and_look_the_same(tmp_path):
    vectors = unit_vectors(6)
    vectors[1] = vectors[2] = vectors[0]  # 0, 1, 2 have the same embedding, of which 2 looks different
    vectors[4] = vectors[3]
    values = {0: 100, 1: 103, 2: 110, 3: 100, 4: 100, 5: 100}  # 5 looks like others, but its embedding differs
    images = {number: {"appearance": appearance(value)} for number, value in values.items()}
    assert groups_of(write_snapshot(tmp_path / "1", vectors, images=images)) == [[0, 1], [3, 4]]


def test_groups_are_those_of_brute_force_whatever_the_block(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    vectors = unit_vectors(5)[rng.integers(0, 5, 60)]
    values = rng.integers(0, 8, 60) * 20
    images = {number: {"appearance": appearance(int(value))} for number, value in enumerate(values)}
    monkeypatch.setattr(module, "NEIGHBORS", 60)
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 7)
    found = groups_of(write_snapshot(tmp_path / "1", vectors, images=images))
    expected = {}
    for number, value in enumerate(values.tolist()):
        expected.setdefault((vectors[number].tobytes(), value), []).append(number)
    assert sorted(found) == sorted(group for group in expected.values() if len(group) > 1)
    assert [len(group) for group in found] == sorted(map(len, found), reverse=True)


def test_the_least_similarity_can_be_chosen(tmp_path):
    vectors = np.array([[1, 0], [0.8, 0.6]], np.float32)
    snapshot = write_snapshot(tmp_path / "1", vectors)
    assert groups_of(snapshot) == [] and groups_of(snapshot, min_similarity=0.75) == [[0, 1]]


def test_an_empty_collection_has_none(tmp_path):
    assert groups_of(write_snapshot(tmp_path / "1", np.zeros((0, 16), np.float32))) == []


@pytest.fixture(scope="module")
def copies(tmp_path_factory, scenes, random_base):
    """A collection of 24 scenes, of which one has three kinds of copies, and two images of noise."""
    folder = tmp_path_factory.mktemp("copies")
    images = shutil.copytree(scenes / "images" / "test", folder / "images")
    original = sorted(images.glob("*.png"))[0]
    shutil.copy(original, images / "same.png")
    image = Image.open(original).convert("RGB")
    image.resize((128, 128), Image.Resampling.BICUBIC).save(images / "larger.png")
    image.save(images / "compressed.jpg", quality=60)
    for seed in range(2):
        noise(seed, 64, 64).save(images / f"noise{seed}.png")
    return original, index(folder / "collection", random_base, images)


def test_real_copies_are_found_and_different_scenes_are_not(copies):
    # The untrained model calls all images similar, so that appearances alone decide.
    original, collection = copies
    [group] = [group for group in collection.duplicates(0.5) if "noise" not in group[0].path]
    names = {original.name, "same.png", "larger.png", "compressed.jpg"}
    assert {hit.path.rsplit("/", 1)[1] for hit in group} == names
    assert all(hit.similarity == hit.score >= 0.5 for hit in group)


def test_an_exact_copy_is_one_image_in_two_places(copies):
    original, collection = copies
    [group] = collection.duplicates(0.99999)
    assert {original.name, "same.png"} <= {hit.path.rsplit("/", 1)[1] for hit in group}
    assert len(collection) == 28
