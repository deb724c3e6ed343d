"""MMEB-train's rows, as the small world writes them and as they may be."""

from random import Random

import pyarrow.parquet as pq
import pytest

from cafe.data.formats.mmeb import mmeb
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.errors import CafeError

ROW = {"qry": "<|image_1|>\nWhat is it?", "qry_image_path": "a.jpg", "pos_text": "a cat", "pos_image_path": ""}


def test_rows_of_a_parquet_file_become_pairs_with_their_hard_negatives(scenes):
    files = sorted((scenes / "mmeb_train").glob("*.parquet"))
    assert len(files) == 4
    sides = ("qry", "qry_image_path"), ("pos_text", "pos_image_path")
    for file in files:
        table = pq.read_table(file).to_pylist()
        records = open_source(Source(path=str(file), images=str(scenes), format="mmeb"))
        assert len(records) == len(table)
        for index, row in enumerate(table):
            pair = records.example(index, Random(0)).pair
            for side, (text, image) in zip((pair.query, pair.target), sides, strict=True):
                assert side.text == row[text].replace("<|image_1|>", "").strip("\n")
                assert [str(ref) for ref in side.images] == ([str(scenes / row[image])] if row[image] else [])
            assert len(pair.negatives) == bool(row["neg_text"] or row["neg_image_path"])


def test_the_image_stands_where_its_token_does():
    pair, dialogue = mmeb(ROW | {"qry": "Left of <|image_1|> is"}, Source(path="x"), Random(0))
    assert [type(part).__name__ for part in pair.query.parts] == ["str", "ImageRef", "str"]
    assert pair.negatives == () and dialogue is None


def test_an_image_token_without_an_image_is_removed():
    # As in WebQA's queries of MMEB-train; a negative of such a token alone is none.
    row = ROW | {"qry": "<|image_1|>\nFind a picture: who?\n", "qry_image_path": "", "neg_text": "<|image_1|>\n"}
    pair, _ = mmeb(row, Source(path="x"), Random(0))
    assert pair.query.parts == ("Find a picture: who?",) and pair.negatives == ()


def test_with_an_answer_prompt_the_target_is_also_the_answer():
    _, dialogue = mmeb(ROW, Source(path="x", answer_prompt=""), Random(0))
    assert [turn.content.text for turn in dialogue.turns] == ["What is it?", "a cat"]
    assert mmeb(ROW | {"pos_image_path": "b.jpg"}, Source(path="x", answer_prompt=""), Random(0))[1] is None


@pytest.mark.parametrize(
    ("change", "side"), [({"pos_text": " "}, "target"), ({"qry": "", "qry_image_path": None}, "query")]
)
def test_a_row_with_an_empty_side_is_named(change, side):
    with pytest.raises(CafeError, match=f"the {side} is empty"):
        mmeb(ROW | change, Source(path="x"), Random(0))
