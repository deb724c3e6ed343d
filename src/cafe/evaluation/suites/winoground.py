"""Winoground: two images and two captions of the same words in different order (arXiv 2204.03162).

The text score is the fraction of examples in which each image prefers its caption, the image score that in which each
caption prefers its image, and the group score that in which both hold. Chance is 25, 25 and 16.7%.
"""

from pathlib import Path
from typing import Any

from jaxtyping import Float
from numpy import ndarray

from cafe.content import ImageRef
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.io import find_image, find_one, json_lines, parquet_rows, require_fields
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate
from cafe.evaluation.suites.choices import MARGINS, METHODS, Scores, score

FIELDS = {"caption_0": str, "caption_1": str, "image_0": str, "image_1": str}


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Measure the first `limit` examples."""
    [path] = find(data)
    records = read(path)[:limit]
    # Images 2n and 2n + 1 belong to example n; both are scored against both captions.
    images, captions = [], []
    for record in records:
        for field in ("image_0", "image_1"):
            images.append(_image_ref(record[field], data, path))
            captions.append((record["caption_0"], record["caption_1"]))
    scores = score(model, images, captions)
    rows = [_judge_example(record, number, scores) for number, record in enumerate(records)]
    return EvaluationResult(aggregate(rows), {"winoground": rows})


def _judge_example(record: dict[str, Any], number: int, scores: Scores) -> dict[str, Any]:
    """Make an example's output row.

    Args:
        record: the example.
        number: the example's.
        scores: of the captions on all images, two images for each example.
    """
    # Rows are the example's two images, columns its two captions.
    by_method = {method: scores[method][2 * number : 2 * number + 2] for method in METHODS}
    # Every method judges by the same rule.
    marks = {}
    for method, (first, second) in by_method.items():
        text, image = judge(first, second, MARGINS[method])
        for name, correct in (("text", text), ("image", image), ("group", text and image)):
            marks[f"winoground/{method}/{name}"] = int(correct)
    return {
        "id": record.get("id", number),
        "captions": [record["caption_0"], record["caption_1"]],
        "scores": {method: [values.tolist() for values in pair] for method, pair in by_method.items()},
        "marks": marks,
    }


def judge(
    first: Float[ndarray, " captions"], second: Float[ndarray, " captions"], margin: float = 0.0
) -> tuple[bool, bool]:
    """Tell whether the images find their captions, and the captions their images.

    Args:
        first: how well captions 0 and 1 fit image 0.
        second: how well they fit image 1.
        margin: scores closer than this count as equal.
    """
    # Text: along each image's row, its own caption wins. Image: along each caption's column, its own image wins.
    text = (first[0] > first[1] + margin) & (second[1] > second[0] + margin)
    image = (first[0] > second[0] + margin) & (second[1] > first[1] + margin)
    return bool(text), bool(image)


def read(path: Path) -> list[dict[str, Any]]:
    """Read the examples: `examples.jsonl`, or the Hub dataset's parquet.

    Raises:
        CafeError: a field is missing.
    """
    if path.suffix == ".jsonl":
        return json_lines(path, FIELDS)
    rows = parquet_rows([path], path, FIELDS)
    return require_fields(path, rows, {"caption_0": str, "caption_1": str})


def _image_ref(value: Any, data: Path, source: Path) -> ImageRef:
    """Take an image as the Hub dataset holds it, or by its name, which may lack the suffix.

    Args:
        value: the field of the example.
        data: the folder of evaluation files.
        source: the file of examples, for the error.
    """
    name = value
    if isinstance(value, dict):
        # The datasets library leaves the bytes out of images that it was told not to embed.
        if isinstance(value.get("bytes"), bytes) and value["bytes"]:
            return ImageRef(value["bytes"])
        name = value.get("path")
    if not isinstance(name, str):
        raise CafeError(f"An image in the evaluation file {source} is neither a name nor an image.")
    # `examples.jsonl` has "ex_0_img_0" for ex_0_img_0.png.
    if not Path(name).suffix:
        name = f"{name}.png"
    return ImageRef(data / find_image(name, data, source, "winoground", "winoground/images"))


def find(data: Path) -> list[Path]:
    """Find the file of examples."""
    return find_one(data, "winoground/*.jsonl", "winoground/*.parquet")


WINOGROUND = Suite(
    name="winoground",
    measures="two images and two captions of the same words, by embedding and by likelihood",
    files=(
        "winoground/examples.jsonl: caption_0, caption_1, image_0, image_1; or the Hub dataset's parquet file",
        "the images NAME.png, in winoground/images/ or inside the parquet file",
    ),
    download="the Hub dataset facebook/winoground; a small version is written by `cafe scenes write DIR`",
    sources=("arXiv 2204.03162",),
    find_files=find,
    run=run,
    default=False,
    headline=("winoground/embedding/group", "winoground/likelihood/group"),
    labels={
        "winoground/embedding/group": "Winoground, by embedding",
        "winoground/likelihood/group": "Winoground, by likelihood",
    },
)
