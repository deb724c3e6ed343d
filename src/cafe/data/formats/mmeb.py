"""MMEB-train's rows (VLM2Vec): a query, its match and perhaps a hard negative, each text, image or both.

    {"qry": "<|image_1|>\\nIdentify the object.", "qry_image_path": "a.jpg", "pos_text": "cat", "pos_image_path": "",
     "neg_text": "dog", "neg_image_path": ""}

An empty path means that there is no image, and an image token in the text is then removed: all of WebQA's queries have
one (github.com/TIGER-AI-Lab/VLM2Vec, issue 65). A row with an empty side cannot be trained on and is a bad record. To
read the texts unchanged, without an embedding instruction, set `prompts.mode: multimodal`. Columns and image tokens are
those of that repository (src/data/dataset/mmeb_dataset.py).
"""

import re
from random import Random
from typing import Any

from cafe.content import Content, Dialogue, Pair
from cafe.data.formats.pairs import answer_dialogue
from cafe.data.image_fields import image_refs, place_images
from cafe.data.source import Source
from cafe.errors import RecordError

MARK = re.compile(r"<\|image_\d+\|>")  # where an image stands in a text


def mmeb(row: Any, source: Source, rng: Random) -> tuple[Pair | None, Dialogue | None]:
    """Parse a record: the query, its match and, if the row has one, the hard negative.

    Raises:
        RecordError: the query or the match is empty.
    """
    query = _side(row["qry"], row["qry_image_path"], source)
    target = _side(row["pos_text"], row["pos_image_path"], source)
    # Without them the pair would teach nothing; a missing hard negative is no mistake.
    for name, side in (("query", query), ("target", target)):
        if not side.parts:
            raise RecordError(f"the {name} is empty.")
    negative = _side(row.get("neg_text"), row.get("neg_image_path"), source)
    pair = Pair(query, target, (negative,) if negative.parts else ())
    return pair, answer_dialogue(pair, source.answer_prompt)


def _side(text: str | None, image: Any, source: Source) -> Content:
    """Make a content of a text and an image, of which each may be missing."""
    refs = image_refs(image, source)
    text = text or ""
    if not refs:
        text = MARK.sub("", text)
    return place_images(text, refs, MARK)
