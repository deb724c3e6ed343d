"""Write a source of the format "pairs" that reads back as the records were, but with mined negatives."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from cafe.content import Content, Dialogue, Example, ImageRef, Pair
from cafe.data.image_fields import IMAGE_TOKEN
from cafe.errors import RecordError
from cafe.images.decoding import open_encoded
from cafe.mining.embed import EmbeddedPairs, Examples, RecordKey


def write_source(
    output: Path, examples: Examples, embedded: EmbeddedPairs, negatives: list[dict[int, float]], soft: bool
) -> dict[RecordKey, str]:
    """Write `records.jsonl` and `quarantine.jsonl` to a folder, and images without a file to its `images`.

    Args:
        output: the folder.
        examples: all records.
        embedded: their pairs.
        negatives: for each pair the numbers of the pairs whose targets are its negatives, and their scores.
        soft: whether to write the scores.

    Returns:
        Why records are bad, in embedding or in writing.
    """
    bad_records = dict(embedded.bad_records)
    chosen = dict(zip(embedded.record_keys, negatives, strict=True))  # a record with no pair has no entry
    path = output / "records.jsonl"
    # Half of a character, in a dialogue that nobody has read yet, is written as JSON escapes it.
    with path.with_suffix(".partial").open("w", encoding="utf-8", errors="backslashreplace") as out:
        for key in tqdm(examples.keys(), desc="write", unit="record"):
            if key in bad_records:
                continue
            try:
                example = _with_negatives(examples, embedded, key, chosen.get(key, {}), soft)
                record = to_record(example, output)
            except RecordError as error:
                bad_records[key] = str(error)
                continue
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    path.with_suffix(".partial").replace(path)  # complete or not there
    with (output / "quarantine.jsonl").open("w") as out:
        out.writelines(json.dumps({"reason": reason}) + "\n" for reason in bad_records.values())
    return bad_records


def _with_negatives(
    examples: Examples, embedded: EmbeddedPairs, key: RecordKey, scores: dict[int, float], soft: bool
) -> Example:
    """Read a record and give its pair the mined negatives; a record without a pair is unchanged."""
    example = examples[key]
    if example.pair is None:
        return example
    # Their records are read once more, so that no more than one record's negatives are in memory.
    pairs = [examples[embedded.record_keys[number]].pair for number in scores]
    negatives = tuple(pair.target for pair in pairs if pair)
    negative_scores = tuple(scores.values()) if soft else ()
    return replace(example, pair=replace(example.pair, negatives=negatives, negative_scores=negative_scores))


def to_record(example: Example, output: Path) -> dict[str, Any]:
    """Make a record of the format "pairs"; images without a file are written to `output`/images.

    Raises:
        RecordError: an image is damaged, as far as its header shows; names the record.
    """
    record: dict[str, Any] = {"id": example.origin}
    try:
        if example.pair:
            record |= _pair_fields(example.pair, output)
        if example.dialogue:
            record |= _dialogue_fields(example.dialogue, output)
    except RecordError as error:
        raise RecordError(f"{example.origin}: {error}") from None
    return record


def _pair_fields(pair: Pair, output: Path) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    fields["query"], fields["query_image"] = _text_and_images(pair.query, output)
    fields["positive"], fields["positive_image"] = _text_and_images(pair.target, output)
    fields["negatives"] = []
    # A mapping, since a negative may have text and images; the other sides have a column for each.
    for negative in pair.negatives:
        text, images = _text_and_images(negative, output)
        fields["negatives"].append({"text": text, "images": images})
    if pair.negative_scores:
        fields["negative_scores"] = [round(score, 4) for score in pair.negative_scores]
    return fields


def _dialogue_fields(dialogue: Dialogue, output: Path) -> dict[str, Any]:
    """Return the fields of a conversation, with the images of all turns in one list, as the llava format has them."""
    fields: dict[str, Any] = {"image": [], "conversations": []}
    for turn in dialogue.turns:
        text, images = _text_and_images(turn.content, output)
        fields["image"] += images
        fields["conversations"].append({"role": turn.role, "content": text})
    return fields


def _text_and_images(content: Content, output: Path) -> tuple[str, list[str]]:
    """Return a content's text with image tokens where its images stand, and the files of these."""
    texts = []
    for part in content.parts:
        # A user's words that look like an image token are broken up, as they are when they are rendered.
        texts.append(part.replace(IMAGE_TOKEN, "< image>") if isinstance(part, str) else IMAGE_TOKEN)
    return "".join(texts), [_image_file(ref, output) for ref in content.images]


def _image_file(ref: ImageRef, output: Path) -> str:
    """Return the path of an image's file, written now if there is none."""
    if isinstance(ref.source, Path):
        return str(ref.source.absolute())
    data = _encode_png(ref.source) if isinstance(ref.source, Image.Image) else ref.source
    # Bytes are kept as they are; only the header is read, for the suffix.
    with open_encoded(replace(ref, source=data)) as (image, _):
        suffix = (image.format or "image").lower()
    # Named by its content, so that an image of several records is written once.
    name = f"images/{hashlib.blake2b(data, digest_size=16).hexdigest()}.{suffix}"
    if not (output / name).is_file():
        (output / name).write_bytes(data)
    return name


def _encode_png(image: Image.Image) -> bytes:
    """Encode an image without loss."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
