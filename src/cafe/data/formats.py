"""Readers of public file formats. Each gives a list of records that become Examples one at a time, when asked.

Only the annotation file is read here; pictures stay references. A record that cannot become an Example raises
`CafeError` with the file and the record named.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from cafe.content import Content, Dialogue, Example, ImageRef, Pair, Part, Turn
from cafe.errors import CafeError

IMAGE_TOKEN = "<image>"  # where an image stands in a LLaVA conversation
DESCRIBE = "Describe the image."


@dataclass(frozen=True, kw_only=True)
class Source:
    """One annotation file and its folder of pictures.

    Attributes:
        path: the annotation file.
        images: the folder that image paths are relative to; by default the annotation file's own.
        format: "llava" or "karpathy".
        split: of a Karpathy file, which split to read; "train" reads "restval" too.
    """

    path: str
    images: str = ""
    format: Literal["llava", "karpathy"] = "llava"
    split: str = "train"


@dataclass(frozen=True)
class Records:
    """An opened source: how many records there are, and how to make an Example of one.

    `example(index, rng)` uses the random numbers for choices, such as which of five captions to take.
    """

    source: Source
    rows: list[Any]
    make: Callable[[Any, Path, Random], tuple[Pair | None, Dialogue | None]]

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int, rng: Random) -> Example:
        """Record number `index` as an Example.

        Raises:
            CafeError: the record is bad.
        """
        row = self.rows[index]
        name = f"{self.source.path}, record {index}"
        if isinstance(row, dict) and "id" in row:
            name += f" (id {row['id']})"
        images = Path(self.source.images) if self.source.images else Path(self.source.path).parent
        try:
            pair, dialogue = self.make(row, images, rng)
        except CafeError as error:
            raise CafeError(f"{name}: {error}") from None
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise CafeError(f"{name}: a field is missing or of the wrong kind ({error}).") from None
        return Example(pair, dialogue, name)


def open_source(source: Source) -> Records:
    """Reads an annotation file.

    Raises:
        CafeError: the file is missing or not of the format.
    """
    path = Path(source.path)
    if not path.is_file():
        raise CafeError(f"The data file {path} does not exist.")
    try:
        if path.suffix == ".jsonl":
            data: Any = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        else:
            data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CafeError(f"The data file {path} is not valid JSON: {error}.") from None
    if source.format == "karpathy":
        if not isinstance(data, dict) or not isinstance(data.get("images"), list):
            raise CafeError(f'The data file {path} has no list "images", as a Karpathy split file has.')
        splits = {"train", "restval"} if source.split == "train" else {source.split}
        return Records(source, [row for row in data["images"] if row.get("split") in splits], _karpathy)
    if not isinstance(data, list):
        raise CafeError(f"The data file {path} is not a list of records, as a LLaVA file is.")
    return Records(source, data, _llava)


def _llava(row: Any, images: Path, rng: Random) -> tuple[Pair | None, Dialogue | None]:
    """The pictures match the first thing the assistant says of them (as CAFe pairs them); all turns are the dialogue.

    An optional list "negatives" holds false captions: hard negatives.
    """
    paths = [row["image"]] if isinstance(row.get("image"), str) else list(row.get("image") or [])
    refs = [ImageRef(images / path) for path in paths]
    waiting = list(refs)
    turns: list[Turn] = []
    for index, said in enumerate(row["conversations"]):
        expected = ("human", "gpt")[index % 2]
        if said["from"] != expected:
            raise CafeError(
                f"turn {index} of the conversation is from {said['from']!r} and should be from {expected!r}."
            )
        if not said["value"].strip():
            raise CafeError(f"turn {index} of the conversation is empty.")
        if expected == "human":
            turns.append(Turn("user", Content(tuple(_interleave(said["value"], waiting)))))
        else:
            turns.append(Turn("assistant", Content.of(said["value"].strip())))
    if not turns or len(turns) % 2:
        raise CafeError("the conversation does not end with an answer.")
    if waiting:
        # Some files name an image and mark no place for it: it is shown first.
        turns[0] = Turn("user", Content((*waiting, *turns[0].content.parts)))
    negatives = tuple(Content.of(text) for text in row.get("negatives", ()))
    pair = Pair(Content(tuple(refs)), turns[1].content, negatives) if refs else None
    return pair, Dialogue(tuple(turns))


def _interleave(text: str, waiting: list[ImageRef]) -> list[Part]:
    first, *others = text.split(IMAGE_TOKEN)
    if len(others) > len(waiting):
        raise CafeError(f"a turn shows {len(others)} images and only {len(waiting)} are left.")
    parts: list[Part] = [first.strip("\n")] if first.strip() else []
    for words in others:
        parts.append(waiting.pop(0))
        if words.strip():
            parts.append(words.strip("\n"))
    return parts


def _karpathy(row: Any, images: Path, rng: Random) -> tuple[Pair | None, Dialogue | None]:
    """One of the image's captions, by lot, is both the target and what the assistant says."""
    captions = [sentence["raw"].strip() for sentence in row["sentences"]]
    if not captions or not all(captions):
        raise CafeError("a caption is empty.")
    ref = ImageRef(images / row.get("filepath", "") / row["filename"])
    caption = Content.of(rng.choice(captions))
    dialogue = Dialogue((Turn("user", Content((ref, DESCRIBE))), Turn("assistant", caption)))
    return Pair(Content((ref,)), caption), dialogue
