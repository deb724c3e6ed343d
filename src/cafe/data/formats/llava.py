"""The format of LLaVA and LLaVA-OneVision training data: a conversation about one or more images.

    {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A cat."}]}

`image` may be a list, and may be named `images`; `video` is a folder or list of frames, shown at the mark <video>.
Turns may also be `{"role": "user", "content": "..."}`, where the content is a text or a list of text and image parts,
or `{"user": "...", "assistant": "..."}` under `texts`, as in The Cauldron.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from random import Random
from typing import Any

from cafe.content import Content, Dialogue, ImageRef, Pair, Turn
from cafe.data.formats.fields import as_list, get_field, get_images, get_scores
from cafe.data.image_fields import IMAGE_TOKEN, assign_to_marks, image_refs, interleave
from cafe.data.source import Columns, Source
from cafe.errors import RecordError

VIDEO_TOKEN = "<video>"
_MARK = re.compile(f"{IMAGE_TOKEN}|{VIDEO_TOKEN}")
_SPEAKERS = {"user": "human", "assistant": "gpt"}  # the names of chat templates -> LLaVA's


def llava(row: Any, source: Source, rng: Random) -> tuple[Pair | None, Dialogue | None]:
    """Parse a record: all turns are the dialogue, and the images match the answer to the turn that shows them first.

    An optional list "negatives" holds false captions, which are hard negatives, and "negative_scores" the probability
    that each is true.

    Raises:
        RecordError: a false caption is not a text, or `parse_conversation` raises it.
    """
    frames = image_refs(row.get("video"), source)
    dialogue = parse_conversation(_conversation(row, source), get_images(row, source), frames)

    # Checked even where no pair is made of them.
    false_captions = as_list(get_field(row, source, "negatives"))
    scores = get_scores(row, source)
    if not all(isinstance(caption, str) for caption in false_captions):
        raise RecordError(f"negatives should be a list of texts, not {false_captions!r:.40}.")
    negatives = tuple(map(Content.of, false_captions))
    for question, answer in zip(dialogue.turns[::2], dialogue.turns[1::2], strict=True):
        # Images of later turns are not what this answer is about.
        if refs := question.content.images:
            return Pair(Content(tuple(refs)), answer.content, negatives, scores), dialogue
    return None, dialogue  # nothing to pair an answer with: the record trains language alone


def _conversation(row: Any, source: Source) -> list[Any]:
    """Return the turns of a record, under the name of the source or under that of The Cauldron.

    Raises:
        RecordError: there is no such field.
    """
    column = source.columns.conversations
    names = (column, "texts") if column == Columns.conversations else (column,)
    for name in names:
        if name in row:
            return as_list(row[name])
    raise RecordError(f"a field is missing: {column!r} holds the conversation; there are {', '.join(map(str, row))}.")


def parse_conversation(turns: list[Any], images: list[ImageRef], frames: Sequence[ImageRef] = ()) -> Dialogue:
    """Parse a conversation about some images.

    Args:
        turns: from user and assistant in turn, in LLaVA's form, that of chat templates or that of The Cauldron.
        images: the images, in order.
        frames: those of a video, which stand at the mark <video>; without one, they are images before the others.

    Raises:
        RecordError: turns do not alternate, one is empty or not a text, or they show more images than there are.
    """
    texts = [_check_turn(index, turn) for index, turn in enumerate(_split_exchanges(turns))]
    if not texts or len(texts) % 2:
        raise RecordError("the conversation does not end with an answer.")

    # The user speaks first, so the turns of the assistant have odd numbers.
    marks = list(chain.from_iterable(map(_MARK.findall, texts[::2])))
    first, runs = _images_at_marks(marks, images, list(frames))
    each_mark = iter(runs)
    parsed: list[Turn] = []
    for index, text in enumerate(texts):
        if index % 2:
            parsed.append(Turn("assistant", Content.of(text.strip())))
        else:
            parsed.append(Turn("user", Content(tuple(interleave(text, each_mark, _MARK)))))
    # Some files name an image and have no mark for it: it is shown first.
    parsed[0] = Turn("user", Content((*first, *parsed[0].content.parts)))
    return Dialogue(tuple(parsed))


def _images_at_marks(
    marks: list[str], images: list[ImageRef], frames: list[ImageRef]
) -> tuple[list[ImageRef], list[list[ImageRef]]]:
    """Return the images that come first and, for each mark of a conversation, those that stand there.

    Raises:
        RecordError: there are more marks than images or videos.
    """
    num_videos = marks.count(VIDEO_TOKEN)
    if num_videos > bool(frames):
        raise RecordError(f"a text shows {num_videos} videos and only {int(bool(frames))} are there.")
    if not num_videos:
        return assign_to_marks(len(marks), [*frames, *images])
    # A video is shown as its frames, one after the other.
    first, runs = assign_to_marks(len(marks) - 1, images)
    runs.insert(marks.index(VIDEO_TOKEN), frames)
    return first, runs


def _split_exchanges(turns: list[Any]) -> Iterator[Any]:
    """Yield turns; The Cauldron holds a question and its answer in one."""
    for turn in turns:
        if isinstance(turn, dict) and {"user", "assistant"} <= turn.keys():
            yield {"from": "human", "value": turn["user"]}
            yield {"from": "gpt", "value": turn["assistant"]}
        else:
            yield turn


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
    """Return who speaks and what, in LLaVA's names or those of chat templates.

    Raises:
        RecordError: the turn has other names.
    """
    if "from" in turn and "value" in turn:
        return turn["from"], turn["value"]
    if "role" not in turn or "content" not in turn:
        raise RecordError(
            "a field is missing: a turn should have the fields from and value, role and content, or user and "
            f"assistant, and has {', '.join(map(str, turn))}."
        )
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
