"""The records everything speaks in: what one side of a pair holds, a dialogue, and an example.

Images are references (a path, bytes, or a picture already in memory), decoded when they are needed by `decode_image`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from cafe.errors import CafeError, RecordError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None


@dataclass(frozen=True, eq=False)
class ImageRef:
    """An image not yet decoded: a file's path, encoded bytes, or a Pillow picture. Compared by identity."""

    source: Path | bytes | Image.Image

    def __str__(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else f"<{type(self.source).__name__}>"


Part = str | ImageRef


@dataclass(frozen=True)
class Content:
    """Text, images, or both interleaved, in reading order."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, value: Any) -> "Content":
        """Content from what people have at hand.

        Args:
            value: text (`str`), a picture (`PIL.Image`, `bytes`, `Path`), a mapping with "image" (or "images") and
                "text", or a sequence of these.

        Raises:
            CafeError: the value is none of these.
        """
        return value if isinstance(value, Content) else cls(tuple(_parts(value)))

    @property
    def images(self) -> list[ImageRef]:
        """The images, in reading order."""
        return [part for part in self.parts if isinstance(part, ImageRef)]

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


def _parts(value: Any) -> list[Part]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, ImageRef):
        return [value]
    if isinstance(value, (Path, bytes, Image.Image)):
        return [ImageRef(value)]
    if isinstance(value, dict):
        unknown = sorted(set(value) - {"image", "images", "text"})
        if unknown or not value:
            raise CafeError(
                f"Content takes the keys image, images and text, not {', '.join(unknown) or 'an empty mapping'}."
            )
        parts: list[Part] = []
        shown, text = value["image"] if "image" in value else value.get("images", []), value.get("text")
        for picture in shown if isinstance(shown, (list, tuple)) else [shown]:
            parts += _parts(Path(picture) if isinstance(picture, str) else picture)
        if text is not None and not isinstance(text, str):
            raise CafeError(f"Content's text should be a str, not a {type(text).__name__}.")
        return parts + ([text] if text else [])
    if isinstance(value, Sequence):
        return [part for item in value for part in _parts(item)]
    raise CafeError(f"Content cannot be made of a {type(value).__name__}: give text, a picture, or a mapping of both.")


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue."""

    role: Literal["user", "assistant"]
    content: Content


@dataclass(frozen=True)
class Dialogue:
    """Turns of user and assistant, in order; the assistant's tokens are supervised."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Pair:
    """Two contents that match, and hard negatives that only look like the target.

    `negative_scores` says how likely each of these matches after all (0 to 1), which makes it a soft target; empty
    where none does.
    """

    query: Content
    target: Content
    negatives: tuple[Content, ...] = ()
    negative_scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.negative_scores and len(self.negative_scores) != len(self.negatives):
            raise RecordError(
                f"there are {len(self.negatives)} negatives and {len(self.negative_scores)} scores of them."
            )
        if wrong := [score for score in self.negative_scores if not 0 <= score <= 1]:
            raise RecordError(f"a negative's score should be between 0 and 1, not {wrong[0]:g}.")


@dataclass(frozen=True)
class Example:
    """One training record: a pair trains contrast, a dialogue trains language, both train both.

    `origin` names the file and record, for messages.
    """

    pair: Pair | None = None
    dialogue: Dialogue | None = None
    origin: str = field(default="", compare=False)
