"""Vectors and captions of encoded images are those of `Cafe`, and one bad image spoils no other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from collection_samples import place
from samples import noise

from cafe.content import ImageLimits
from cafe.index import embedding
from cafe.index.embedding import embed_rows
from cafe.index.reading import Reader
from cafe.lvlm.processing import with_fast_images
from cafe.lvlm.prompts import DESCRIBE_PROMPT

SIZES = [(24, 18), (40, 40), (17, 90), (24, 18)]


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(len(SIZES))]
    for number, (path, size) in enumerate(zip(paths, SIZES, strict=True)):
        noise(number, *size).save(path)
    return paths


def encode(tiny, paths, prompt=""):
    """Encode images as the workers do, by the names of their files."""
    chat_processor, normalization = with_fast_images(tiny.chat_processor)
    reader = Reader(chat_processor, np.array([b""]), prompt, ImageLimits())
    readings = [reader._read_image(place(str(path), None), path.read_bytes) for path in paths]
    return {path.name: reading.encoded for path, reading in zip(paths, readings, strict=True)}, normalization


def test_vectors_are_those_of_embed(tiny, images):
    encoded, normalization = encode(tiny, images)
    rows = embed_rows(tiny, encoded, normalization, 8)
    for row, vector, size in zip(rows.values(), tiny.embed(images), SIZES, strict=True):
        assert row.vector @ vector > 0.99999 and (row.width, row.height) == size
        assert row.caption is None and row.caption_vector is None
    assert embed_rows(tiny, {}, normalization, 8) == {}


def test_captions_and_their_vectors_are_those_of_the_model(tiny, images):
    encoded, normalization = encode(tiny, images, DESCRIBE_PROMPT)
    rows = list(embed_rows(tiny, encoded, normalization, 8).values())
    vectors, captions = tiny.embed_and_generate_batch(images, DESCRIBE_PROMPT, 8)
    assert [row.caption for row in rows] == captions
    for row, vector, of_caption in zip(rows, vectors, tiny.embed(captions), strict=True):
        assert row.vector @ vector > 0.99999
        assert row.caption_vector is None if not row.caption else row.caption_vector @ of_caption > 0.99999


def test_an_empty_caption_has_no_vector(tiny, images, monkeypatch):
    encoded, normalization = encode(tiny, images[:1], DESCRIBE_PROMPT)
    monkeypatch.setattr(type(tiny), "embed_and_generate_branches", lambda self, pairs, _: (np.ones((1, 160)), [""]))
    [row] = embed_rows(tiny, encoded, normalization, 8).values()
    assert row.caption == "" and row.caption_vector is None


def test_an_image_that_is_not_finite_fails_alone(tiny, images):
    encoded, normalization = encode(tiny, images)
    bad = encoded["1.png"]
    pixels = torch.full_like(bad.embedding.image_inputs["pixel_values"], torch.nan, dtype=torch.float32)
    inputs = {**bad.embedding.image_inputs, "pixel_values": pixels}
    others = {name: embedding._normalize(image.embedding, normalization) for name, image in encoded.items()}
    others["1.png"] = replace(bad.embedding, image_inputs=inputs)
    mixed = {name: replace(encoded[name], embedding=branch) for name, branch in others.items()}
    rows = embed_rows(tiny, mixed, None, 8)
    assert sorted(rows) == ["0.png", "2.png", "3.png"]
    for name, row in rows.items():
        [vector] = tiny.embed([images[0].with_name(name)])
        assert row.vector @ vector > 0.99999


@pytest.mark.parametrize("prompt", ["", DESCRIBE_PROMPT])
def test_where_memory_runs_out_halves_give_the_same(tiny, images, monkeypatch, prompt):
    encoded, normalization = encode(tiny, images, prompt)
    whole = embed_rows(tiny, encoded, normalization, 4)
    counts, embed = [], embedding._embed

    def with_little_memory(model, images, *arguments):
        counts.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return embed(model, images, *arguments)

    monkeypatch.setattr(embedding, "_embed", with_little_memory)
    halves = embed_rows(tiny, encoded, normalization, 4)
    assert counts == [4, 2, 1, 1, 2, 1, 1]
    for name, row in whole.items():
        assert halves[name].vector @ row.vector > 0.99999 and halves[name].caption == row.caption


def test_one_image_that_is_too_large_for_the_memory_and_other_errors_are_raised(tiny, images, monkeypatch):
    encoded, normalization = encode(tiny, images[:2])
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("something else")):
        monkeypatch.setattr(embedding, "_embed", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            embed_rows(tiny, encoded, normalization, 4)
