"""The contents whose embeddings tell a model from any other."""

import hashlib

import numpy as np
from samples import unit

from cafe.images.decoding import decode_image
from cafe.index.golden import MIN_COSINE, golden_contents, golden_vectors, load_model, lowest_cosine, model_name


def test_the_contents_never_change():
    contents = golden_contents()
    pixels = [np.array(decode_image(image)).tobytes() for content in contents for image in content.images]
    assert [content.text for content in contents[:3]] == [
        "a dog runs on the beach", "two red boats in front of a house", "a page with a table of numbers",
    ]  # fmt: skip
    assert hashlib.sha256(b"".join(pixels)).hexdigest().startswith("c233bb3e9fc61baa")
    assert len(contents) == 6


def test_the_lowest_cosine_is_that_of_the_worst_content():
    first, second = unit(4, 8, 0), unit(4, 8, 1)
    by_hand = min(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(first, 2 * second, strict=True))
    assert np.isclose(lowest_cosine(first, 2 * second), by_hand)
    assert lowest_cosine(first, unit(4, 9, 0)) == -1
    assert not lowest_cosine(first, np.full_like(first, np.nan)) >= MIN_COSINE


def test_half_precision_passes_and_another_prompt_does_not(tiny):
    vectors = golden_vectors(tiny)
    assert lowest_cosine(vectors, vectors.astype(np.float16).astype(np.float32)) >= MIN_COSINE
    other = tiny.with_prompts(image_instruction="What is it?")
    assert lowest_cosine(vectors, golden_vectors(other)) < MIN_COSINE


def test_a_directory_is_called_by_its_absolute_path_and_a_hub_id_as_it_is(tiny, random_base, monkeypatch):
    assert model_name(tiny) == str(random_base) and load_model(tiny) is tiny
    monkeypatch.chdir(random_base.parent)
    assert model_name(random_base.name) == str(random_base)
    assert model_name("owner/model") == "owner/model"
