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


def test_a_system_turn_is_named():
    row = {"messages": [{"role": "system", "content": "Be good."}]}
    with pytest.raises(CafeError, match="turn 0 of the conversation is from 'system'"):
        llava(row, Source(path="x.json", columns=Columns(conversations="messages")), Random(0))
