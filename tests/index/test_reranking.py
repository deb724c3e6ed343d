"""Reranking: the order against likelihoods of each image by itself, and images that are gone."""

import os
import shutil

import numpy as np
import pytest
from search_samples import index, load

from cafe.errors import CafeError
from cafe.index.query import Query
from cafe.index.reranking import rerank_hits


@pytest.fixture
def collection(tmp_path, scenes, random_base):
    """A collection of 24 scenes in a folder that may be changed."""
    folder = shutil.copytree(scenes / "images" / "test", tmp_path / "images")
    return index(tmp_path / "collection", random_base, folder)


def likelihood(model, hit):
    return model.score([{"image": hit.path}, "Describe the image."], "a red star")


def test_the_best_20_are_ordered_by_the_likelihood_of_the_words(collection, random_base):
    model, roots = load(random_base), collection.manifest.roots
    hits = collection.search("a red star", 24)
    reranked = rerank_hits(model, "a red star", hits, roots)
    assert reranked[20:] == hits[20:] and {hit.id for hit in reranked} == {hit.id for hit in hits}
    values = np.array([likelihood(model, hit) for hit in reranked[:20]])
    assert (np.diff(values) <= 1e-4 * abs(values).max()).all()
    assert reranked[:20] != hits[:20]


def test_an_image_that_is_gone_stays_behind_those_that_can_be_read(collection, random_base):
    hits = collection.search("a red star", 5)
    os.remove(hits[0].path)
    reranked = rerank_hits(load(random_base), "a red star", hits, collection.manifest.roots)
    assert {hit.id for hit in reranked[:4]} == {hit.id for hit in hits[1:]} and reranked[4] == hits[0]
    for hit in hits[1:]:
        os.remove(hit.path)
    assert rerank_hits(load(random_base), "a red star", hits, collection.manifest.roots) == hits


def test_a_short_list_is_chosen_from_the_20_best(collection, random_base):
    hits = collection.search("a red star", 20)
    best = max(hits, key=lambda hit: likelihood(load(random_base), hit))
    assert collection.search("a red star", 1, rerank=True) == [best]
    assert hits[0] != best


@pytest.mark.parametrize("excluded", [True, False])
def test_a_query_that_is_not_words_is_refused(collection, excluded):
    image = collection.search("a red star", 1)[0].path
    query = Query.parse(["star", "-", "red"] if excluded else [image])
    with pytest.raises(CafeError, match="Only a query of words can be reranked"):
        collection.search(query, rerank=True)
