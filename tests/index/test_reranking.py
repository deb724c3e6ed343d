"""Reranking: the order against a direct computation of the odds, and images that are gone."""

import os
import shutil

import numpy as np
import pytest
from search_samples import index, load

from cafe.content import Content, Dialogue, Turn
from cafe.index import reranking as module
from cafe.index.query import Query
from cafe.index.reranking import QUESTION, rerank_hits
from cafe.lvlm.forward import forward_packed
from cafe.lvlm.prompts import dialogue_messages
from cafe.mining.judge import yes_probability
from cafe.packing import pack


@pytest.fixture
def collection(tmp_path, scenes, random_base):
    """A collection of 24 scenes in a folder that may be changed."""
    folder = shutil.copytree(scenes / "images" / "test", tmp_path / "images")
    return index(tmp_path / "collection", random_base, folder)


def yes_of(model, hit, words):
    """The probability that the model says yes about one image, asked by itself."""
    content = Content((*Content.of({"image": hit.path}).parts, "\n", words, QUESTION))
    messages = dialogue_messages(Dialogue((Turn("user", content),)), model.chat_processor.prompts)
    images = model.chat_processor.load_images(content.images)
    prompt = model.chat_processor.encode_prompt(messages, images)
    hidden, _ = forward_packed(model.lvlm, pack([[prompt]], [[]], model.packing))
    return float(yes_probability(model, hidden).detach()[0])


def test_the_best_20_are_ordered_by_the_product_of_both_odds(collection, random_base):
    model, roots = load(random_base), collection.manifest.roots
    hits = collection.search("a red star", 24)
    reranked = rerank_hits(model, Query.of("a red star"), hits, roots)
    assert reranked[20:] == hits[20:] and {hit.id for hit in reranked} == {hit.id for hit in hits}
    odds = {}
    for rank, hit in enumerate(hits[:20], 1):
        yes = yes_of(model, hit, "a red star")
        odds[hit.id] = yes / (1 - yes) / rank
    values = np.array([odds[hit.id] for hit in reranked[:20]])
    assert (values[1:] <= values[:-1] * 1.001).all()


def test_a_model_that_always_says_the_same_changes_nothing(collection, random_base, monkeypatch):
    monkeypatch.setattr(module, "_ask", lambda model, contents: np.full(len(contents), 0.9))
    hits = collection.search("a red star", 24)
    assert rerank_hits(load(random_base), Query.of("a red star"), hits, collection.manifest.roots) == hits


def test_excluded_terms_are_not_asked_about(collection, random_base, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "_ask", lambda model, contents: asked.extend(contents) or np.full(len(contents), 0.5))
    hits = collection.search("star", 2)
    rerank_hits(load(random_base), Query.parse(["star", "+", "2:red", "-", "blue"]), hits, collection.manifest.roots)
    assert [content.text for content in asked] == ["\nstarred" + QUESTION] * 2
    assert all(len(content.images) == 1 for content in asked)


def test_an_image_that_is_gone_stays_behind_those_that_can_be_judged(collection, random_base):
    hits = collection.search("a red star", 5)
    os.remove(hits[0].path)
    reranked = rerank_hits(load(random_base), Query.of("a red star"), hits, collection.manifest.roots)
    assert {hit.id for hit in reranked[:4]} == {hit.id for hit in hits[1:]} and reranked[4] == hits[0]
    for hit in hits[1:]:
        os.remove(hit.path)
    assert rerank_hits(load(random_base), Query.of("a red star"), hits, collection.manifest.roots) == hits


def test_a_short_list_is_chosen_from_the_20_best(collection, monkeypatch):
    # The model says yes of the last one alone.
    monkeypatch.setattr(module, "_ask", lambda model, contents: np.array([1e-6] * 19 + [1 - 1e-6]))
    hits = collection.search("a red star", 20)
    assert collection.search("a red star", 1, rerank=True) == [hits[19]]
