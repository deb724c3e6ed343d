"""Winoground: two pictures and two captions of the same words in other order (arXiv 2204.03162).

The text score is the share of examples in which each picture prefers its caption, the image score that in which each
caption prefers its picture, and the group score that in which both hold. By chance: 25, 25 and 16.7%.
"""

from pathlib import Path
from typing import Any

from jaxtyping import Float
from numpy import ndarray

from cafe.content import ImageRef
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate, find_image, find_one, json_lines, parquet_rows
from cafe.evaluation.suites.choices import MARGINS, WAYS, score

FIELDS = {"caption_0": str, "caption_1": str, "image_0": str, "image_1": str}


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Measures the first `limit` examples."""
    [path] = find(data)
    records = read(path)[:limit]
    pictures = [_picture(record[f"image_{side}"], data, path) for record in records for side in (0, 1)]
    captions = [(record["caption_0"], record["caption_1"]) for record in records for _ in (0, 1)]
    scores = score(model, pictures, captions)
    rows: list[dict[str, Any]] = []
    for number, record in enumerate(records):
        found = {way: scores[way][2 * number : 2 * number + 2] for way in WAYS}
        marks = {}
        for way in WAYS:
            text, image = right(found[way][0], found[way][1], MARGINS[way])
            for name, hit in (("text", text), ("image", image), ("group", text and image)):
                marks[f"winoground/{way}/{name}"] = int(hit)
        row = {"id": record.get("id", number), "captions": [record["caption_0"], record["caption_1"]]}
        row["scores"] = {way: [side.tolist() for side in found[way]] for way in WAYS}
        rows.append({**row, "marks": marks})
    return EvaluationResult(aggregate(rows), {"winoground": rows})


def right(
    first: Float[ndarray, " captions"], second: Float[ndarray, " captions"], margin: float = 0.0
) -> tuple[bool, bool]:
    """Whether the pictures find their captions, and the captions their pictures.

    Args:
        first: how well captions 0 and 1 fit picture 0.
        second: how well they fit picture 1.
        margin: how much higher is higher.
    """
    text = first[0] > first[1] + margin and second[1] > second[0] + margin
    image = first[0] > second[0] + margin and second[1] > first[1] + margin
    return bool(text), bool(image)


def read(path: Path) -> list[dict[str, Any]]:
    """The examples: `examples.jsonl`, or the Hub dataset's parquet.

    Raises:
        CafeError: a field is missing.
    """
    if path.suffix == ".jsonl":
        return json_lines(path, FIELDS)
    return parquet_rows([path], path, FIELDS)


def _picture(value: Any, data: Path, source: Path) -> ImageRef:
    if isinstance(value, dict) and value.get("bytes"):
        return ImageRef(value["bytes"])
    name = value["path"] if isinstance(value, dict) else value
    name = name if Path(name).suffix else f"{name}.png"
    return ImageRef(data / find_image(name, data, source, "winoground", "winoground/images"))


def find(data: Path) -> list[Path]:
    """The one file of examples."""
    path = find_one(data, "winoground/*.jsonl", "winoground/*.parquet")
    return [path] if path else []


WINOGROUND = Suite(
    name="winoground",
    measures="two pictures and two captions of the same words, by embedding and by likelihood",
    files=(
        "winoground/examples.jsonl: caption_0, caption_1, image_0, image_1; or the Hub dataset's parquet file",
        "the pictures NAME.png, in winoground/images/ or inside the parquet file",
    ),
    download="the Hub dataset facebook/winoground; written small by `cafe scenes write DIR`",
    sources=("arXiv 2204.03162",),
    find_files=find,
    run=run,
    default=False,
)
