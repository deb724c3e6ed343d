"""Karpathy's split files of Flickr30K and COCO: pictures with several captions each.

{"images": [{"filename": "a.jpg", "filepath": "val2014", "split": "train", "sentences": [{"raw": "A cat."}]}]}
"""

from random import Random
from typing import Any

from cafe.content import Content, Dialogue, Pair, Turn
from cafe.data.image_fields import image_refs
from cafe.data.source import Source
from cafe.errors import CafeError

DESCRIBE = "Describe the image."


def karpathy(row: Any, source: Source, rng: Random) -> tuple[Pair | None, Dialogue | None]:
    """One of the image's captions, by lot, is both the target and what the assistant says.

    Raises:
        CafeError: a caption is empty; or the image is of another split, in a file from which `split_of` took none out.
    """
    if row.get("split") and not split_of([row], source.split):
        raise CafeError(f"it is of the split {row['split']!r}, and {source.split!r} is read.")
    captions = [sentence["raw"].strip() for sentence in row["sentences"]]
    if not captions or not all(captions):
        raise CafeError("a caption is empty.")
    place = row.get("filepath", "")
    [ref] = image_refs(f"{place}/{row['filename']}" if place else row["filename"], source)
    caption = Content.of(rng.choice(captions))
    dialogue = Dialogue((Turn("user", Content((ref, DESCRIBE))), Turn("assistant", caption)))
    return Pair(Content((ref,)), caption), dialogue


def split_of(rows: list[Any], split: str) -> list[Any]:
    """The records of a split; "train" takes "restval" too, as is the custom with COCO."""
    wanted = {"train", "restval"} if split == "train" else {split}
    return [row for row in rows if row.get("split") in wanted]
