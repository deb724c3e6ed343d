"""The records that everything takes: what one side of a pair holds, a dialogue, and an example.

Images are references (a path, bytes, or an image already in memory), which `cafe.images.decoding` decodes when needed.
"""

import hashlib
import logging
import mimetypes
import os.path
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from cafe.errors import CafeError, RecordError

logger = logging.getLogger(__name__)

PILLOW_MAX_PIXELS = 178_956_970  # above these Pillow refuses an image, and above half of them it warns


@dataclass(frozen=True)
class ImageLimits:
    """Limit what reading one image may cost.

    Attributes:
        max_bytes: the most bytes of an encoded image.
        max_pixels: the most pixels; by default as many as Pillow decodes without a warning.
    """

    max_bytes: int = 256 * 2**20
    max_pixels: int = PILLOW_MAX_PIXELS // 2


DEFAULT_LIMITS = ImageLimits()


# Pillow compares images pixel by pixel and cannot hash them, so references are compared by identity.
@dataclass(frozen=True, eq=False)
class ImageRef:
    """Refer to an image that is not decoded yet: a file's path, encoded bytes, or a Pillow image. Equal by identity.

    The limits apply to files and encoded bytes, not to a Pillow image, which is in memory already. The name is what
    messages call the image, if it is not a file.
    """

    source: Path | bytes | Image.Image
    limits: ImageLimits = DEFAULT_LIMITS
    name: str = ""

    def __str__(self) -> str:
        if self.name:
            return self.name
        # Only a path means something in a message; of the rest, the kind is named.
        if isinstance(self.source, Path):
            return str(self.source)
        return f"<{type(self.source).__name__}>"

    @property
    def key(self) -> Hashable:
        """Return what references to the same image have in common: its path or bytes, or the Pillow image's identity.

        The identity of a Pillow image is another's once it is gone: whoever keeps keys keeps the references too.
        """
        source = id(self.source) if isinstance(self.source, Image.Image) else self.source
        return source, self.limits

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 digest of encoded bytes; empty for a path and for a Pillow image."""
        return hashlib.sha256(self.source).hexdigest() if isinstance(self.source, bytes) else ""


Part = str | ImageRef


@dataclass(frozen=True)
class Content:
    """Hold text, images, or both interleaved, in reading order."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, value: Any) -> "Content":
        """Make content of common values. A string is text; within "image" or "images" it is a path.

        Args:
            value: text (`str`), an image (`PIL.Image`, `bytes`, `Path`), a mapping with "image" (or "images") and
                "text", or a sequence of these.

        Raises:
            RecordError: the value is none of these.
        """
        if isinstance(value, Content):
            return value
        try:
            return cls(tuple(_parts(value)))
        except RecursionError:
            raise RecordError("Content is nested too deeply: give a flat list of texts and images.") from None

    @property
    def images(self) -> list[ImageRef]:
        """Return the images, in reading order."""
        return [part for part in self.parts if isinstance(part, ImageRef)]

    @property
    def text(self) -> str:
        """Return the text parts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


def _parts(value: Any) -> Iterator[Part]:
    """Yield the parts of a value in reading order.

    Raises:
        RecordError: the value, or something in it, is no content.
    """
    # Text comes before sequences, because a string is one, and so are bytes. A string is text here and not a path.
    match value:
        case str() | ImageRef():
            yield value
        case Path() | bytes() | Image.Image():
            yield ImageRef(value)
        case dict():
            yield from _parts_of_mapping(value)
        case Sequence():
            for item in value:
                yield from _parts(item)
        case _:
            raise RecordError(
                f"Content cannot be made of a {type(value).__name__}: give text, an image, or a mapping of both."
            )


def _parts_of_mapping(value: dict[str, Any]) -> Iterator[Part]:
    """Yield the parts of a mapping of "image" or "images" and "text": the images come first.

    Raises:
        RecordError: the mapping has other keys, none or both "image" and "images", or its text is not a string.
    """
    unknown = sorted(set(value) - {"image", "images", "text"})
    if unknown or not value:
        names = ", ".join(unknown) or "an empty mapping"
        raise RecordError(f"Content takes the keys image, images and text, not {names}.")
    # Columns of a table may hold null where a record has no text.
    text = value.get("text")
    if not isinstance(text, str | None):
        raise RecordError(f"Content's text should be a str, not a {type(text).__name__}.")

    # Either key takes one image or several, and null where a record has none.
    image, images = value.get("image"), value.get("images")
    if image is not None and images is not None:
        raise RecordError("Content takes the key image or the key images, not both.")
    if images is None:
        images = [] if image is None else image
    if not isinstance(images, (list, tuple)):
        images = [images]
    for image in images:
        # A string is a path here, because text has a key of its own.
        yield from _parts(_path(image) if isinstance(image, str) else image)
    if text:
        yield text


def checked_content(value: Any) -> Content:
    """Make content of a value, and warn where a text is the path of an image that exists: as text, it is not opened.

    Raises:
        RecordError: no content can be made of it.
    """
    content = Content.of(value)
    for part in content.parts:
        if not isinstance(part, str) or not os.path.isfile(part):
            continue
        if (mimetypes.guess_type(part)[0] or "").startswith("image/"):
            logger.warning('"%s" is taken as text, not as the image of that path: write {"image": "%s"}.', part, part)
    return content


def content_list(contents: Any) -> list[Any]:
    """Return a sequence as a list; a single content would be taken apart, a text into its letters.

    Raises:
        CafeError: it is a single content.
    """
    if isinstance(contents, (str, bytes, dict)) or not isinstance(contents, Iterable):
        raise CafeError(f"Expected a list of contents, not a {type(contents).__name__}: put a single one in a list.")
    return list(contents)


def prompt_content(image: Any, prompt: str) -> Content:
    """Make the content of a user's turn: images, of which a string is the path of one, before the words."""
    if isinstance(image, Content):
        return Content((*image.parts, prompt))
    return Content.of({"images": image, "text": prompt})


def _path(name: str) -> Path:
    """Return the path of an image's file.

    Raises:
        RecordError: it is a URL, which a path would mangle.
    """
    if "://" in name:
        raise RecordError(f"The image {name:.200} is a URL, which is not taken here: give a path or the image's bytes.")
    return Path(name)


@dataclass(frozen=True)
class Turn:
    """Hold one turn of a dialogue."""

    role: Literal["user", "assistant"]
    content: Content


@dataclass(frozen=True)
class Dialogue:
    """Hold turns of user and assistant, in order; the assistant's tokens are supervised."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Pair:
    """Hold two contents that match, and hard negatives, which look like the target but do not match the query.

    `negative_scores` says how likely each negative matches after all (0 to 1), which makes it a soft target; it is
    empty if none does.
    """

    query: Content
    target: Content
    negatives: tuple[Content, ...] = ()
    negative_scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        # Whoever reads the record puts its file and number before these messages.
        num_negatives, num_scores = len(self.negatives), len(self.negative_scores)
        if num_scores not in (0, num_negatives):
            raise RecordError(f"there are {num_negatives} negatives and {num_scores} scores of them.")
        for score in self.negative_scores:
            if not 0 <= score <= 1:
                raise RecordError(f"a negative's score should be between 0 and 1, not {score:g}.")


@dataclass(frozen=True)
class Example:
    """Hold one training record: a pair trains retrieval, a dialogue trains language modeling, both train both.

    `origin` names the file and record, for messages.
    """

    pair: Pair | None = None
    dialogue: Dialogue | None = None
    origin: str = field(default="", compare=False)  # records that hold the same are equal, wherever they stand
