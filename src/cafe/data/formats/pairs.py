"""Pairs under names that the source's `columns` map: a query, its match and hard negatives.

    {"query": "which is red?", "query_image": "a.jpg", "positive": "the left one", "negatives": ["the right one"]}

An image may be a path, bytes or base64, and several images a list or a folder; <image> in the text marks where an image
stands. A negative may be a text, or a mapping of "text" and "image"; "negative_scores" holds the probability that each
matches after all, which makes it a soft target. A record may also hold a dialogue, as in the format of LLaVA, beside
its pair or alone.
"""

from dataclasses import replace
from itertools import compress, zip_longest
from random import Random
from typing import Any

from cafe.content import Content, Dialogue, Pair, Turn
from cafe.data.formats.fields import as_list, get_field, get_images, get_scores, missing_column
from cafe.data.formats.llava import parse_conversation
from cafe.data.image_fields import image_refs, place_images
from cafe.data.source import Source
from cafe.errors import RecordError


def pairs(row: Any, source: Source, rng: Random) -> tuple[Pair | None, Dialogue | None]:
    """Parse a record: its pair with hard negatives, and its conversation or the one that `answer_prompt` makes.

    Raises:
        RecordError: a column is missing, a side is empty or of the wrong kind, or negatives do not go together.
    """
    # One of several captions.
    positive = get_field(row, source, "positive")
    if isinstance(positive, (list, tuple)):
        positive = rng.choice(positive) if positive else None
    # An empty side is no mistake yet: a record may hold a dialogue alone.
    query = _content(get_field(row, source, "query"), get_field(row, source, "query_image"), source)
    target = _content(positive, get_field(row, source, "positive_image"), source)
    dialogue = _conversation(row, source, query)
    if dialogue and not query.parts and not target.parts:
        return None, dialogue
    _check_side(row, source, "query", query)
    _check_side(row, source, "positive", target)
    negatives = _negatives(row, source)
    # Dropped only now, so that scores are checked beside what they were given for.
    pair = _drop_empty_negatives(Pair(query, target, tuple(negatives), get_scores(row, source)))
    return pair, dialogue or answer_dialogue(pair, source.answer_prompt)


def answer_dialogue(pair: Pair, answer_prompt: str | None) -> Dialogue | None:
    """Make a dialogue of a pair: the query and a prompt from the user, the target as the answer if it is text alone.

    Args:
        pair: the query and its match.
        answer_prompt: what the user says after the query; "" adds nothing, None makes no dialogue.
    """
    if answer_prompt is None or pair.target.images:
        return None

    question = pair.query
    if answer_prompt:
        question = Content((*question.parts, answer_prompt))
    answer = Content.of(pair.target.text.strip())
    return Dialogue((Turn("user", question), Turn("assistant", answer)))


def _check_side(row: Any, source: Source, name: str, side: Content) -> None:
    """Make sure that the query or the positive has a column and is not empty.

    Raises:
        RecordError: it has no column, or is empty.
    """
    # A missing column is more often a wrong name than an empty side, and gets another message.
    columns = [getattr(source.columns, name), getattr(source.columns, f"{name}_image")]
    if not any(column in row for column in columns):
        raise missing_column(" or ".join(map(repr, columns)), row)
    if not side.parts:
        raise RecordError(f"the {name} is empty.")


def _conversation(row: Any, source: Source, query: Content) -> Dialogue | None:
    """Parse the conversation of a record that has one, about the record's images."""
    turns = as_list(get_field(row, source, "conversations"))
    if not turns:
        return None
    # An image that both show is the same reference, so that it is decoded and encoded once.
    is_same = get_field(row, source, "image") == row.get(source.columns.query_image)
    if is_same and query.images:
        return parse_conversation(turns, query.images)
    return parse_conversation(turns, get_images(row, source))


def _negatives(row: Any, source: Source) -> list[Content]:
    """Return the hard negatives, of which each may have its text, its image or both; some may be empty.

    Raises:
        RecordError: there are texts and images, but not as many.
    """
    texts = as_list(get_field(row, source, "negatives"))
    images = as_list(get_field(row, source, "negative_images"))
    if texts and images and len(texts) != len(images):
        raise RecordError(f"there are {len(texts)} negatives and {len(images)} images of negatives.")
    # Where one of the two columns is empty, its values are missing one by one.
    return [_content(text, image, source) for text, image in zip_longest(texts, images)]


def _drop_empty_negatives(pair: Pair) -> Pair:
    """Drop negatives without content, together with their scores."""
    has_content = [bool(negative.parts) for negative in pair.negatives]
    return replace(
        pair,
        negatives=tuple(compress(pair.negatives, has_content)),
        negative_scores=tuple(compress(pair.negative_scores, has_content)),
    )


def _content(text: Any, image: Any, source: Source) -> Content:
    """Make a content of a text field and an image field, or of a mapping in the text field that holds both.

    Raises:
        RecordError: the text is not a text, or the image not an image.
    """
    if isinstance(text, dict):
        text, image = text.get("text"), text.get("image", text.get("images"))
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise RecordError(f"a text is a {type(text).__name__}: {str(text)[:40]}.")
    return place_images(text.strip(), image_refs(image, source))
