"""Public formats become Examples; bad records are named."""

import json
from random import Random

import pytest

from cafe.data.formats import Source, open_source
from cafe.errors import CafeError


def turns(*values):
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


def write(path, rows):
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return open_source(Source(path=str(path)))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_llava_record_pairs_its_image_with_the_first_answer(tmp_path, name):
    row = {"id": "7", "image": "p.png", "conversations": turns("<image>\nDescribe.", "a cat", "Color?", "black")}
    example = write(tmp_path / name, [row | {"negatives": ["a dog"]}]).example(0, Random(0))
    assert example.pair.query.images[0].source == tmp_path / "p.png"
    assert example.pair.target.text == "a cat" and example.pair.negatives[0].text == "a dog"
    assert [turn.content.text for turn in example.dialogue.turns] == ["Describe.", "a cat", "Color?", "black"]
    assert example.dialogue.turns[0].content.images == example.pair.query.images
    assert "record 0 (id 7)" in example.source


def test_several_images_stand_where_their_tokens_do(tmp_path):
    row = {"image": ["a.png", "b.png"], "conversations": turns("from <image> to <image>?", "yes")}
    parts = write(tmp_path / "a.json", [row]).example(0, Random(0)).dialogue.turns[0].content.parts
    assert [part if isinstance(part, str) else part.source.name for part in parts] == [
        "from ", "a.png", " to ", "b.png", "?",
    ]  # fmt: skip


def test_a_text_only_record_trains_language_only(tmp_path):
    example = write(tmp_path / "a.json", [{"conversations": turns("Hello", "Hi")}]).example(0, Random(0))
    assert example.pair is None and example.dialogue is not None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": turns("a", "")}, "turn 1 of the conversation is empty"),
        ({"conversations": turns("a", "b")[::-1]}, "turn 0 of the conversation is from 'gpt'"),
        ({"conversations": turns("a")}, "does not end with an answer"),
        ({"conversations": turns("<image>a", "b")}, "shows 1 images and only 0"),
        ({"image": "a.png"}, "field is missing"),
        ("text", "field is missing"),
    ],
)
def test_a_bad_record_is_named_with_its_reason(tmp_path, row, reason):
    with pytest.raises(CafeError, match=reason) as error:
        write(tmp_path / "bad.json", [row]).example(0, Random(0))
    assert "bad.json, record 0" in str(error.value)


def test_a_karpathy_image_takes_one_of_its_captions_by_lot(tmp_path):
    image = {"filename": "a.jpg", "filepath": "val", "sentences": [{"raw": "one"}, {"raw": "two"}]}
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"images": [image | {"split": split} for split in ("train", "restval", "test")]}))
    records = open_source(Source(path=str(path), images="/pictures", format="karpathy"))
    assert len(records) == 2
    said = {records.example(0, Random(seed)).pair.target.text for seed in range(20)}
    assert said == {"one", "two"}
    assert str(records.example(0, Random(0)).pair.query.images[0]) == "/pictures/val/a.jpg"


@pytest.mark.parametrize("text", ["{", '{"a": 1}'])
def test_a_file_of_another_format_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CafeError, match=r"x\.json"):
        open_source(Source(path=str(tmp_path / "x.json")))
    with pytest.raises(CafeError, match=r"none\.json does not exist"):
        open_source(Source(path=str(tmp_path / "none.json")))
