"""Write mined records that read back as they were."""

import hashlib
import io
from pathlib import Path
from typing import Any

from PIL import Image

from cafe.content import Content, Example, ImageRef
from cafe.data.image_fields import IMAGE_TOKEN
from cafe.errors import CafeError
from cafe.images.decoding import image_errors


def to_record(example: Example, output: Path) -> dict[str, Any]:
    """An example as a record of the format "pairs"; pictures without a file are written to `output`/images.

    Raises:
        CafeError: one of these is damaged, so far as is seen without decoding it; the record is named.
    """
    try:
        return _as_row(example, output)
    except CafeError as error:
        raise CafeError(f"{example.origin}: {error}") from None


def _as_row(example: Example, output: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"id": example.origin}
    if example.pair:
        for side, content in (("query", example.pair.query), ("positive", example.pair.target)):
            row[side], row[f"{side}_image"] = _marked(content, output)
        negatives = [_marked(negative, output) for negative in example.pair.negatives]
        row["negatives"] = [{"text": text, "images": images} for text, images in negatives]
        if example.pair.negative_scores:
            row["negative_scores"] = [round(score, 4) for score in example.pair.negative_scores]
    if example.dialogue:
        said = [(turn.role, *_marked(turn.content, output)) for turn in example.dialogue.turns]
        row["image"] = [image for _, _, images in said for image in images]
        row["conversations"] = [{"role": role, "content": text} for role, text, _ in said]
    return row


def _marked(content: Content, output: Path) -> tuple[str, list[str]]:
    """A content's text with marks where its pictures stand, and where those are kept."""
    # A user's words that look like a mark are broken up, as they are when they are rendered.
    texts = [part.replace(IMAGE_TOKEN, "< image>") if isinstance(part, str) else IMAGE_TOKEN for part in content.parts]
    return "".join(texts), [_kept(ref, output) for ref in content.images]


def _kept(ref: ImageRef, output: Path) -> str:
    if isinstance(ref.source, Path):
        return str(ref.source.absolute())
    data = ref.source
    if isinstance(data, Image.Image):
        out = io.BytesIO()
        data.save(out, "PNG")
        data = out.getvalue()
    with image_errors(ref), Image.open(io.BytesIO(data)) as image:
        suffix = (image.format or "image").lower()
    name = f"images/{hashlib.blake2b(data, digest_size=16).hexdigest()}.{suffix}"
    if not (output / name).is_file():
        (output / name).write_bytes(data)
    return name
