"""MMEB-train's rows (VLM2Vec): a query, its match and perhaps a hard negative, each text, picture or both.

    {"qry": "<|image_1|>\\nIdentify the object.", "qry_image_path": "a.jpg", "pos_text": "cat", "pos_image_path": "",
     "neg_text": "dog", "neg_image_path": ""}

An empty string is no picture, and then a mark in the text stands for nothing: WebQA's queries all have one
(github.com/TIGER-AI-Lab/VLM2Vec, issue 65). A row with an empty side cannot be trained on: it is left out like any bad
record, named and counted. To read the texts as they are, with no instruction added, set `prompts.mode: multimodal`.
Columns and marks are as that repository reads them (src/data/dataset/mmeb_dataset.py).
"""

import re
from random import Random
from typing import Any

from cafe.content import Content, Dialogue, Pair
from cafe.data.formats.pairs import answer_dialogue
from cafe.data.image_fields import image_refs, place_images
from cafe.data.source import Source
from cafe.errors import CafeError

MARK = re.compile(r"<\|image_\d+\|>")  # where a picture stands in a text


def mmeb(row: Any, source: Source, rng: Random) -> tuple[Pair | None, Dialogue | None]:
    """The query, its match and, where the row has one, the hard negative."""
    query, target = (
        _side(row["qry"], row["qry_image_path"], source),
        _side(row["pos_text"], row["pos_image_path"], source),
    )
    for name, side in (("query", query), ("target", target)):
        if not side.parts:
            raise CafeError(f"the {name} is empty.")
    negative = _side(row.get("neg_text"), row.get("neg_image_path"), source)
    pair = Pair(query, target, (negative,) if negative.parts else ())
    return pair, answer_dialogue(pair, source.answer_prompt)


def _side(text: str | None, image: Any, source: Source) -> Content:
    refs, text = image_refs(image, source), text or ""
    return place_images(text if refs else MARK.sub("", text), refs, MARK)
