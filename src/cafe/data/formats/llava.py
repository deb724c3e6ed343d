"""The format of LLaVA and LLaVA-OneVision training data: a conversation about one or more images.

    {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A cat."}]}

`image` may be a list; `video` is a folder or list of frames, shown at the mark <video> or first. Turns may also be
`{"role": "user", "content": "..."}`, where the content is a text or a list of text and image parts.
"""

import json
from contextlib import suppress
from random import Random
from typing import Any

from cafe.content import Content, Dialogue, ImageRef, Pair, Turn
from cafe.data.image_fields import IMAGE_TOKEN, image_refs, interleave
from cafe.data.source import Source
from cafe.errors import RecordError

_SPEAKERS = {"user": "human", "assistant": "gpt"}  # the names of chat templates -> LLaVA's


def llava(row: Any, source: Source, rng: Random) -> tuple[Pair | None, Dialogue | None]:
    """Parse a record: all turns are the dialogue, and the images match the first answer (as CAFe pairs them).

    An optional list "negatives" holds false captions, which are hard negatives, and "negative_scores" the probability
    that each is true.

    Raises:
        RecordError: a false caption is not a text, or `parse_conversation` raises it.
    """
    frames = image_refs(row.get("video"), source)
    refs = [*frames, *image_refs(row.get(source.columns.image), source)]
    dialogue = parse_conversation(as_list(row[source.columns.conversations]), refs, len(frames))

    # Checked even where no pair is made of them.
    false_captions = as_list(row.get("negatives"))
    scores = tuple(as_list(row.get("negative_scores")))
    if not all(isinstance(caption, str) for caption in false_captions):
        raise RecordError(f"negatives should be a list of texts, not {false_captions!r:.40}.")
    if not refs:  # nothing to pair the answer with: the record trains language alone
        return None, dialogue
    negatives = tuple(map(Content.of, false_captions))
    return Pair(Content(tuple(refs)), dialogue.turns[1].content, negatives, scores), dialogue


def parse_conversation(turns: list[Any], refs: list[ImageRef], num_frames: int = 0) -> Dialogue:
    """Parse a conversation about some images.

    Args:
        turns: from user and assistant in turn, in LLaVA's form or that of chat templates.
        refs: the images, in order.
        num_frames: how many of them, from the first on, are a video and stand at the mark <video>.

    Raises:
        RecordError: turns do not alternate, one is empty or not a text, or they show more images than there are.
    """
    waiting = list(refs)
    parsed: list[Turn] = []
    for index, turn in enumerate(turns):
        text = _check_turn(index, turn)
        # The user speaks first, so the turns of the assistant have odd numbers.
        if index % 2:
            parsed.append(Turn("assistant", Content.of(text.strip())))
        else:
            # A video is shown as its frames, one after the other.
            marked = text.replace("<video>", IMAGE_TOKEN * num_frames)
            parsed.append(Turn("user", Content(tuple(interleave(marked, waiting)))))
    if not parsed or len(parsed) % 2:
        raise RecordError("the conversation does not end with an answer.")
    if waiting:
        # Some files name an image and have no mark for it: it is shown first.
        parsed[0] = Turn("user", Content((*waiting, *parsed[0].content.parts)))
    return Dialogue(tuple(parsed))


def _check_turn(index: int, turn: dict[str, Any]) -> str:
    """Return a turn's text.

    Raises:
        RecordError: it is empty, no text, or from another speaker than expected.
    """
    speaker, text = _speaker_and_text(turn)
    expected = ("human", "gpt")[index % 2]
    if speaker != expected:
        raise RecordError(f"turn {index} of the conversation is from {speaker!r} and should be from {expected!r}.")
    if not isinstance(text, str):
        raise RecordError(f"turn {index} of the conversation is a {type(text).__name__} and should be a text.")
    if not text.strip():
        raise RecordError(f"turn {index} of the conversation is empty.")
    return text


def _speaker_and_text(turn: dict[str, Any]) -> tuple[Any, Any]:
    """Return who speaks and what, in LLaVA's names or those of chat templates."""
    if "from" in turn:
        return turn["from"], turn["value"]
    content = turn["content"]
    # A list of parts refers to the record's images in order, as image tokens in a text do.
    if not isinstance(content, str):
        content = "".join(map(_part_text, content))
    return _SPEAKERS.get(turn["role"], turn["role"]), content


def _part_text(part: dict[str, Any]) -> str:
    """Return the text of a part, or the image token of an image."""
    if part["type"] == "image":
        return IMAGE_TOKEN
    text: str = part["text"]
    return text


def as_list(value: Any) -> list[Any]:
    """Return a field's values: it may be a list, a single value or, in a CSV file, a list as JSON."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(json.JSONDecodeError):  # then it is a text that begins with a bracket
            value = json.loads(value)
    # A CSV file has no null: an empty cell is no value.
    match value:
        case None | "":
            return []
        case list() | tuple():
            return list(value)
    return [value]
