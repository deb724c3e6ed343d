"""Karpathy's split files of Flickr30K and COCO: images with several captions each.

{"images": [{"filename": "a.jpg", "filepath": "val2014", "split": "train", "sentences": [{"raw": "A cat."}]}]}
"""

from random import Random
from typing import Any

from cafe.content import Content, Dialogue, Pair, Turn
from cafe.data.image_fields import image_refs
from cafe.data.source import Source
from cafe.errors import RecordError
from cafe.lvlm.prompts import DESCRIBE_PROMPT


def karpathy(row: Any, source: Source, rng: Random) -> tuple[Pair | None, Dialogue | None]:
    """Parse a record: a randomly chosen caption is both the target and what the assistant says.

    Raises:
        RecordError: there is no caption, or an empty one; or the image is of another split, in a file that
            `select_split` did not filter.
    """
    # JSON lines of such records hold all splits: training must not read the test images.
    if row.get("split") and not select_split([row], source.split):
        raise RecordError(f"it is of the split {row['split']!r}, and {source.split!r} is read.")
    captions = [sentence["raw"].strip() for sentence in row["sentences"]]
    if not captions:
        raise RecordError("it has no sentences, so there is no caption to train on.")
    if not all(captions):
        raise RecordError("a caption is empty.")
    # COCO's images are spread over folders, Flickr30K's are not.
    file = row["filename"]
    if row.get("filepath"):
        file = f"{row['filepath']}/{file}"
    # Exactly one image: anything else makes the record bad.
    [ref] = image_refs(file, source)
    caption = Content.of(rng.choice(captions))
    question = Content((ref, DESCRIBE_PROMPT))
    dialogue = Dialogue((Turn("user", question), Turn("assistant", caption)))
    return Pair(Content((ref,)), caption), dialogue


def select_split(rows: list[Any], split: str) -> list[Any]:
    """Return the records of a split; "train" includes "restval", as is usual with COCO."""
    wanted = ("train", "restval") if split == "train" else (split,)  # no set, in which a list could not be looked up
    return [row for row in rows if row.get("split") in wanted]
