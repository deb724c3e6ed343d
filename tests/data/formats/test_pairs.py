"""Pairs, under our names or a source's own."""

from random import Random

import pytest

from cafe.data.formats.pairs import pairs
from cafe.data.source import Columns, Source
from cafe.errors import CafeError


def texts(contents):
    return [content.text for content in contents]


def read(row, **source):
    return pairs(row, Source(path="x.jsonl", format="pairs", **source), Random(0))


def test_both_sides_and_negatives_may_hold_text_and_images():
    row = {
        "query": "left of <image>?", "query_image": b"1", "positive": "a cat", "positive_image": [b"2", b"3"],
        "negatives": ["a dog", {"text": "a hen", "image": b"4"}],
    }  # fmt: skip
    pair, dialogue = read(row)
    assert pair.query.text == "left of ?" and pair.query.parts[1].source == b"1"
    assert [ref.source for ref in pair.target.images] == [b"2", b"3"] and pair.target.text == "a cat"
    assert texts(pair.negatives) == ["a dog", "a hen"] and pair.negatives[1].images[0].source == b"4"
    assert dialogue is None


def test_other_names_are_mapped_and_a_wrong_one_is_named():
    columns = Columns(query_image="img", positive="caption")
    pair, _ = read({"img": b"1", "caption": "a cat"}, columns=columns)
    assert pair.query.images[0].source == b"1" and pair.target.text == "a cat"
    with pytest.raises(CafeError, match="no column 'img'; there are image, caption"):
        read({"image": b"1", "caption": "a cat"}, columns=columns)


def test_of_several_positives_one_is_chosen_at_random():
    rows = [pairs({"query": "q", "positive": ["a", "b"]}, Source(path="x"), Random(seed)) for seed in range(20)]
    assert {pair.target.text for pair, _ in rows} == {"a", "b"}


@pytest.mark.parametrize(
    ("negatives", "expected"), [("a dog", ["a dog"]), ('["a", "b"]', ["a", "b"]), ("[a dog", ["[a dog"]), ("", [])]
)
def test_a_csv_cell_holds_one_negative_or_a_list_as_json(negatives, expected):
    assert texts(read({"query": "q", "positive": "p", "negatives": negatives})[0].negatives) == expected


def test_images_of_negatives_stand_beside_their_texts():
    pair, _ = read({"query": "q", "positive": "p", "negative_images": [b"1", b"2"]})
    assert [negative.images[0].source for negative in pair.negatives] == [b"1", b"2"]
    with pytest.raises(CafeError, match="1 negatives and 2 images"):
        read({"query": "q", "positive": "p", "negatives": ["n"], "negative_images": [b"1", b"2"]})


def test_scores_of_negatives_stay_beside_them():
    row = {"query": "q", "positive": "p", "negatives": ["a", "", "b"], "negative_scores": [0.2, 0.3, 1]}
    pair, _ = read(row)
    assert texts(pair.negatives) == ["a", "b"] and pair.negative_scores == (0.2, 1.0)
    with pytest.raises(CafeError, match="3 negatives and 2 scores"):
        read(row | {"negative_scores": [0.2, 0.3]})
    with pytest.raises(CafeError, match=r"between 0 and 1, not 1\.5"):
        read(row | {"negative_scores": [0.2, 1.5, 0]})


def test_with_an_answer_prompt_the_positive_is_also_the_answer():
    _, dialogue = read({"query_image": b"1", "positive": "a cat"}, answer_prompt="Describe the image.")
    assert texts(turn.content for turn in dialogue.turns) == ["Describe the image.", "a cat"]
    assert dialogue.turns[0].content.images[0].source == b"1"


@pytest.mark.parametrize("row", [{"question": "q", "positive": "p"}, {"query": "q", "text": "p"}, {"a.png": "b.png"}])
def test_a_side_without_a_column_is_named_with_the_columns_there_are(row):
    """Such as a CSV file without a header, whose first row is taken for one."""
    with pytest.raises(CafeError, match=rf"no column '(query|positive)' or '\1_image'; there are {', '.join(row)}\."):
        read(row)


@pytest.mark.parametrize("row", [{"query": "q", "positive": None}, {"query": " ", "positive": "p"}])
def test_an_empty_side_is_named(row):
    with pytest.raises(CafeError, match=r"the (query|positive) is empty"):
        read(row)
    with pytest.raises(CafeError, match="a text is a int"):
        read({"query": 3, "positive": "p"})
