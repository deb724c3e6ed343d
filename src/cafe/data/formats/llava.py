"""The format of LLaVA and LLaVA-OneVision training data: a conversation about one or more pictures.

    {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A cat."}]}

`image` may be a list; `video` is a folder or list of frames, shown at the mark <video> or first. Turns may also be
`{"role": "user", "content": "..."}`, the content a text or a list of text and image parts.
"""

import json
from contextlib import suppress
from random import Random
from typing import Any

from cafe.content import Content, Dialogue, ImageRef, Pair, Turn
from cafe.data.image_fields import IMAGE_TOKEN, image_refs, interleave
from cafe.data.source import Source
from cafe.errors import CafeError

_SPEAKERS = {"user": "human", "assistant": "gpt"}  # the names of chat templates -> LLaVA's


def llava(row: Any, source: Source, rng: Random) -> tuple[Pair | None, Dialogue | None]:
    """The pictures match the first thing the assistant says of them (as CAFe pairs them); all turns are the dialogue.

    An optional list "negatives" holds false captions: hard negatives; "negative_scores", how likely each is true.

    Raises:
        CafeError: a false caption is no text, or as `parse_conversation` does.
    """
    frames = image_refs(row.get("video"), source)
    refs = [*frames, *image_refs(row.get(source.columns.image), source)]
    dialogue = parse_conversation(as_list(row[source.columns.conversations]), refs, len(frames))
    false, scores = as_list(row.get("negatives")), tuple(as_list(row.get("negative_scores")))
    if not all(isinstance(caption, str) for caption in false):
        raise CafeError(f"negatives should be a list of texts, not {false!r:.40}.")
    negatives = tuple(map(Content.of, false))
    pair = Pair(Content(tuple(refs)), dialogue.turns[1].content, negatives, scores) if refs else None
    return pair, dialogue


def parse_conversation(said_by_all: list[Any], refs: list[ImageRef], frames: int = 0) -> Dialogue:
    """A conversation about some pictures; the first `frames` of them stand at the mark <video>.

    Raises:
        CafeError: the turns do not alternate, one is empty or no text, or they show more pictures than there are.
    """
    waiting = list(refs)
    turns: list[Turn] = []
    for index, said in enumerate(said_by_all):
        speaker, value = _turn_text(said)
        expected = ("human", "gpt")[index % 2]
        if speaker != expected:
            raise CafeError(f"turn {index} of the conversation is from {speaker!r} and should be from {expected!r}.")
        if not isinstance(value, str):
            raise CafeError(f"turn {index} of the conversation is a {type(value).__name__} and should be a text.")
        if not value.strip():
            raise CafeError(f"turn {index} of the conversation is empty.")
        if expected == "human":
            marked = value.replace("<video>", IMAGE_TOKEN * frames)
            turns.append(Turn("user", Content(tuple(interleave(marked, waiting)))))
        else:
            turns.append(Turn("assistant", Content.of(value.strip())))
    if not turns or len(turns) % 2:
        raise CafeError("the conversation does not end with an answer.")
    if waiting:
        # Some files name an image and mark no place for it: it is shown first.
        turns[0] = Turn("user", Content((*waiting, *turns[0].content.parts)))
    return Dialogue(tuple(turns))


def _turn_text(turn: dict[str, Any]) -> tuple[str, str]:
    """Who speaks, and what, whichever names the file uses."""
    if "from" in turn:
        return turn["from"], turn["value"]
    content = turn["content"]
    if not isinstance(content, str):
        content = "".join(IMAGE_TOKEN if part["type"] == "image" else part["text"] for part in content)
    return _SPEAKERS.get(turn["role"], turn["role"]), content


def as_list(value: Any) -> list[Any]:
    """A field that holds several: a list, one alone, or, in a CSV file, a list as JSON."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(json.JSONDecodeError):  # then it is a text that begins with a bracket
            value = json.loads(value)
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
