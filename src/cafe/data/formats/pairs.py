"""Pairs under names that the source's `columns` say: a query, its match and hard negatives.

    {"query": "which is red?", "query_image": "a.jpg", "positive": "the left one", "negatives": ["the right one"]}

A picture may be a path, bytes or base64, and several pictures a list or a folder; a mark <image> in the text is a
picture's place. A negative may be a text, or a mapping of "text" and "image"; "negative_scores" says how likely each
matches after all, which makes it a soft target. A record may also hold a dialogue, as in
the format of LLaVA, beside its pair or alone.
"""

from dataclasses import replace
from itertools import compress
from random import Random
from typing import Any

from cafe.content import Content, Dialogue, Pair, Turn
from cafe.data.formats.llava import as_list, parse_conversation
from cafe.data.image_fields import image_refs, place_images
from cafe.data.source import Columns, Source
from cafe.errors import CafeError

_USUAL = Columns()


def pairs(row: Any, source: Source, rng: Random) -> tuple[Pair | None, Dialogue | None]:
    """The query, its match and its hard negatives; with `source.ask`, also a dialogue of the two."""

    def field(name: str) -> Any:
        column = getattr(source.columns, name)
        if column not in row and column != getattr(_USUAL, name):
            raise CafeError(f"there is no column {column!r}; there are {', '.join(map(str, row))}.")
        return row.get(column)

    positive = field("positive")
    if isinstance(positive, (list, tuple)) and positive:
        positive = rng.choice(positive)
    query = _content(field("query"), field("query_image"), source)
    target = _content(positive, field("positive_image"), source)
    spoken = None
    if turns := field("conversations"):
        # What both show is one picture, to be decoded and read once.
        same = row.get(source.columns.image) == row.get(source.columns.query_image)
        refs = query.images if same else image_refs(row.get(source.columns.image), source)
        spoken = parse_conversation(turns, refs)
    if spoken and not query.parts and not target.parts:
        return None, spoken
    for name, side in (("query", query), ("positive", target)):
        columns = getattr(source.columns, name), getattr(source.columns, f"{name}_image")
        if not any(column in row for column in columns):
            wanted = " or ".join(map(repr, columns))
            raise CafeError(f"there is no column {wanted}; there are {', '.join(map(str, row))}.")
        if not side.parts:
            raise CafeError(f"the {name} is empty.")
    texts, images = as_list(field("negatives")), as_list(field("negative_images"))
    if texts and images and len(texts) != len(images):
        raise CafeError(f"there are {len(texts)} negatives and {len(images)} pictures of negatives.")
    negatives = [
        _content(text, image, source)
        for text, image in zip(texts or [None] * len(images), images or [None] * len(texts), strict=True)
    ]
    scores = [float(score) for score in as_list(field("negative_scores"))]
    pair = Pair(query, target, tuple(negatives), tuple(scores))
    shown = [bool(negative.parts) for negative in negatives]
    pair = replace(pair, negatives=tuple(compress(negatives, shown)), negative_scores=tuple(compress(scores, shown)))
    return pair, spoken or answer_dialogue(pair, source.answer_prompt)


def answer_dialogue(pair: Pair, ask: str | None) -> Dialogue | None:
    """The query and a request as the user's turn, the target as the answer, where that is text alone."""
    if ask is None or pair.target.images:
        return None
    asked = Content((*pair.query.parts, *([ask] if ask else [])))
    return Dialogue((Turn("user", asked), Turn("assistant", Content.of(pair.target.text.strip()))))


def _content(text: Any, image: Any, source: Source) -> Content:
    if isinstance(text, dict):
        text, image = text.get("text"), text.get("image", text.get("images"))
    if text is not None and not isinstance(text, str):
        raise CafeError(f"a text is a {type(text).__name__}: {str(text)[:40]}.")
    return place_images(text.strip() if text else "", image_refs(image, source))
