"""LLaVA's conversations, and their relatives."""

from random import Random

import pytest
from samples import png

from cafe.data.formats.llava import llava
from cafe.data.source import Columns, Source
from cafe.errors import CafeError


def parts(turn):
    return [part if isinstance(part, str) else part.source for part in turn.content.parts]


def test_turns_of_chat_templates_read_like_llavas():
    row = {
        "pictures": [b"1", b"2"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
            {"role": "assistant", "content": "two"},
        ],
    }
    columns = Columns(image="pictures", conversations="messages")
    pair, dialogue = llava(row, Source(path="x.json", columns=columns), Random(0))
    assert parts(dialogue.turns[0]) == [b"1", "and", b"2"]
    assert pair.target.text == "two" and [ref.source for ref in pair.query.images] == [b"1", b"2"]


@pytest.mark.parametrize(("value", "expected"), [("<video>\nWhat?", "What?"), ("What?", "What?")])
def test_a_video_is_its_frames_in_place_of_its_mark(tmp_path, value, expected):
    (tmp_path / "clip").mkdir()
    for number in range(3):
        (tmp_path / "clip" / f"{number}.png").write_bytes(png("red"))
    row = {
        "video": "clip",
        "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "a red film"}],
    }
    pair, dialogue = llava(row, Source(path=str(tmp_path / "x.json")), Random(0))
    assert parts(dialogue.turns[0]) == [*(tmp_path / "clip" / f"{number}.png" for number in range(3)), expected]
    assert len(pair.query.images) == 3


def said(*values):
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


def read(row, **columns):
    return llava(row, Source(path="x.json", columns=Columns(**columns)), Random(0))


def sources(content):
    return [ref.source for ref in content.images]


@pytest.mark.parametrize("images", [b"1", [b"1"], [b"1", b"2"]])
@pytest.mark.parametrize("key", ["image", "images"])
def test_images_are_read_under_image_and_images(key, images):
    pair, _ = read({key: images, "conversations": said("What is it?", "A square.")})
    assert sources(pair.query) == (images if isinstance(images, list) else [images])
    assert read({"image": None, "images": [b"1"], "conversations": said("What?", "A square.")})[0] is not None


def test_a_column_that_was_named_must_be_there():
    row = {"picture": b"1", "conversations": said("What?", "A square.")}
    with pytest.raises(CafeError, match="no column 'image_path'; there are picture, conversations"):
        read(row, image="image_path")
    with pytest.raises(CafeError, match="no column 'scores'"):
        read(row, negative_scores="scores")


@pytest.mark.parametrize("marked", ["<image>\nWhat happens?", "<image>\r\nWhat happens?"])
def test_one_mark_stands_for_all_images_in_their_order(marked):
    frames = [bytes([number]) for number in range(4)]
    pair, dialogue = read({"image": frames, "conversations": said(marked, "A bar moves.")})
    assert parts(dialogue.turns[0]) == [*frames, "What happens?"]
    assert sources(pair.query) == frames
    video = read({"video": frames, "conversations": said("In <image> what happens?", "A bar moves.")})[1]
    assert parts(video.turns[0]) == ["In ", *frames, " what happens?"]


def test_dialogue_and_pair_show_images_in_one_order_where_marks_are_missing():
    row = {"image": [b"1", b"2", b"3"], "conversations": said("<image> and <image>?", "Two.")}
    pair, dialogue = read(row)
    assert sources(dialogue.turns[0].content) == sources(pair.query) == [b"1", b"2", b"3"]


def test_an_image_that_a_later_turn_shows_is_paired_with_that_turns_answer():
    turns = said("Hello", "Hi!", "<image>\nWhat is it?", "A red square.", "<image> And this?", "A green one.")
    pair, dialogue = read({"image": [b"1", b"2"], "conversations": turns})
    assert sources(pair.query) == [b"1"] and pair.target.text == "A red square."
    assert [sources(turn.content) for turn in dialogue.turns[::2]] == [[], [b"1"], [b"2"]]


@pytest.mark.parametrize("columns", [{}, {"conversations": "texts", "image": "images"}])
def test_the_cauldrons_texts_are_a_conversation(columns):
    row = {
        "images": [b"1"],
        "texts": [{"user": "What?", "assistant": "A square."}, {"user": "Red?", "assistant": "Yes"}],
    }
    pair, dialogue = read(row, **columns)
    assert [turn.role for turn in dialogue.turns] == ["user", "assistant"] * 2
    assert parts(dialogue.turns[0]) == [b"1", "What?"] and pair.target.text == "A square."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"texts": [{"question": "a", "answer": "b"}]}, "a turn should have .* and has question, answer"),
        ({"text": "a"}, "'conversations' holds the conversation; there are text"),
        ({"conversations": said("<video>", "b")}, "shows 1 videos and only 0"),
        ({"conversations": said("a", "b"), "negatives": ["c"], "negative_scores": [10**400]}, "should be numbers"),
    ],
)
def test_what_is_wrong_with_a_record_is_said_by_its_fields(row, reason):
    with pytest.raises(CafeError, match=reason):
        read(row)


def test_a_system_turn_is_named():
    row = {"messages": [{"role": "system", "content": "Be good."}]}
    with pytest.raises(CafeError, match="turn 0 of the conversation is from 'system'"):
        llava(row, Source(path="x.json", columns=Columns(conversations="messages")), Random(0))
