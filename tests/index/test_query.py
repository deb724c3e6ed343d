"""Queries: how the words of a command line become terms, and terms become a vector."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from search_samples import load

from cafe.errors import CafeError
from cafe.index.query import Query


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with an image."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 10), "red").save("boat.jpg")
    Image.new("RGB", (20, 10), "blue").save("my boat.png")
    return tmp_path


def terms(query):
    """Each term as its words or the path of its image, and its weight."""
    return [
        (str(term.content.images[0].source) if term.content.images else term.content.text, term.weight)
        for term in query.terms
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["two", "boats", "at", "sunset"], [("two boats at sunset", 1)]),
        (["boats", "+", "at night", "-", "0.5:people"], [("boats", 1), ("at night", 1), ("people", -0.5)]),
        (["2:boats", "+", ".25:red"], [("boats", 2), ("red", 0.25)]),
        (["-", "people"], [("people", -1)]),
        (["+", "boats", "-", "people"], [("boats", 1), ("people", -1)]),
        (["boats", "-", "2:red", "sails"], [("boats", 1), ("red sails", -2)]),
        (["well-known", "c++", "a+b"], [("well-known c++ a+b", 1)]),
        (["title:", "a", "boat"], [("title: a boat", 1)]),
        (["note:boat"], [("note:boat", 1)]),
        (["16:9", "photo"], [("16:9 photo", 1)]),
        (["at", "10:30"], [("at 10:30", 1)]),
        (["10:30", "train", "+", "red"], [("10:30 train", 1), ("red", 1)]),
        (["half a ~ tilde"], [("half a ~ tilde", 1)]),
        (["boats.jpg"], [("boats.jpg", 1)]),  # there is no such file, so it may be a name to look for
    ],
)
def test_words_are_joined_and_terms_have_signs_and_weights(words, expected, folder):
    assert terms(Query.parse(words)) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["./boat.jpg"], [("boat.jpg", 1)]),
        (["boat.jpg"], [("boat.jpg", 1)]),
        (["0.5:./boat.jpg", "+", "at night"], [("boat.jpg", 0.5), ("at night", 1)]),
        (["red", "-", "./my", "boat.png"], [("red", 1), ("my boat.png", -1)]),
    ],
)
def test_a_term_may_be_the_path_of_an_image(words, expected, folder):
    assert terms(Query.parse(words)) == expected


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert terms(Query.parse(["~/boat.jpg"])) == [(str(folder / "boat.jpg"), 1)]
    assert terms(Query.parse([str(folder / "boat.jpg")])) == [(str(folder / "boat.jpg"), 1)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "A term of the query is empty"),
        ([""], "A term of the query is empty"),
        (["+"], "A term of the query is empty"),
        (["boats", "+"], "A term of the query is empty"),
        (["boats", "+", "-", "red"], "A term of the query is empty"),
        (["-", "-", "red"], "A term of the query is empty"),
        (["boats", "+", "2:", " "], "A term of the query is empty"),
        (["./gone.jpg"], "The image ./gone.jpg does not exist."),
        (["red", "+", "../gone"], "The image ../gone does not exist."),
        (["./"], "./ is a folder"),
        (["https://example.org/boat.jpg"], "is not on this machine: download it first."),
        (["./" + "x" * 5000 + ".jpg"], "does not exist."),
    ],
)
def test_what_cannot_be_searched_for_is_one_sentence(words, sentence, folder):
    with pytest.raises(CafeError) as error:
        Query.parse(words)
    assert sentence in str(error.value) and len(str(error.value)) < 500


@given(st.lists(st.text(min_size=1).filter(lambda word: word not in ("+", "-")), min_size=1))
def test_any_words_without_signs_are_a_query_or_an_error(words):
    try:
        query = Query.parse(words)
    except CafeError:
        return
    assert len(query.terms) == 1
    text, weight = terms(query)[0]
    joined = " ".join(words)
    assert joined.endswith(text) and weight >= 0
    assert text == joined or float(joined.removesuffix(text).removesuffix(":")) == weight


@pytest.mark.parametrize(
    ("words", "searched"),
    [
        (["red", "boats"], "red boats"),
        (["red", "+", "2:boats"], "red boats"),
        (["red", "-", "boats"], ""),
        (["red", "+", "./boat.jpg"], ""),
    ],
)
def test_texts_are_searched_for_words_alone_of_which_none_is_excluded(words, searched, folder):
    assert Query.parse(words).words == searched


def test_a_querys_vector_is_the_unit_vector_of_the_weighted_sum(random_base, folder):
    model = load(random_base)
    query = Query.parse(["2:./boat.jpg", "+", "at night", "-", "0.5:people"])
    image, night, people = (
        model.embed([content])[0] for content in (Image.open("boat.jpg").convert("RGB"), "at night", "people")
    )
    total = 2 * image + night - 0.5 * people
    vector = query.embed(model)
    np.testing.assert_allclose(vector, total / np.linalg.norm(total), atol=1e-5)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_an_image_and_words_in_one_mapping_are_read_together(random_base, folder):
    model = load(random_base)
    both = Query.of({"image": str(folder / "boat.jpg"), "text": "at night"})
    assert len(both.terms) == 1 and both.has_words and not both.words
    np.testing.assert_allclose(
        both.embed(model), model.embed([{"image": str(folder / "boat.jpg"), "text": "at night"}])[0], atol=1e-6
    )
    apart = Query.parse(["./boat.jpg", "+", "at night"])
    assert abs(both.embed(model) @ apart.embed(model)) < 0.999


def test_terms_that_cancel_out_are_one_sentence(random_base):
    for words in (["a", "boat", "-", "a", "boat"], ["0:boat"]):
        with pytest.raises(CafeError, match="cancel out"):
            Query.parse(words).embed(load(random_base))


@pytest.mark.parametrize("nothing", ["", "  ", [], {"text": ""}])
def test_nothing_is_no_query(nothing):
    with pytest.raises(CafeError):
        Query.of(nothing)
