"""SugarCrepe: an image's caption against one that is changed in a small, plausible way (arXiv 2306.14610).

Seven files: an attribute or object added; an attribute, object or relation replaced; attributes or objects swapped.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.io import find_image, json_records
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate
from cafe.evaluation.suites.choices import judge_choices, score

CHANGES = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
FIELDS = {"filename": str, "caption": str, "negative_caption": str}


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Measure every file that is there, the first `limit` records of each."""
    result = EvaluationResult()
    for path in find(data):
        part = f"sugarcrepe/{path.stem}"
        rows = _judge_records(model, data, path, part, limit)
        result.outputs[part] = rows
        result.results |= aggregate(rows)
    # Only after all files: a mean is over those that are there.
    for name, averaged in means(list(result.results)).items():
        result.add_mean(name, averaged)
    return result


def _judge_records(model: CachedModel, data: Path, path: Path, part: str, limit: int | None) -> list[dict[str, Any]]:
    """Score the two captions of each record of a file.

    Args:
        model: the model.
        data: the folder of evaluation files.
        path: the records' file.
        part: begins the names of the results.
        limit: the number of records; all of them if None.
    """
    records = json_records(path, FIELDS)[:limit]
    images = [find_image(record["filename"], data, path, "val2017") for record in records]
    captions = [(record["caption"], record["negative_caption"]) for record in records]
    scores = score(model, [data / image for image in images], captions)
    rows: list[dict[str, Any]] = []
    for number, (image, (caption, negative)) in enumerate(zip(images, captions, strict=True)):
        # Records about one image are one group for the bootstrap.
        row = {"id": number, "group": str(image), "image": str(image), "caption": caption, "negative": negative}
        rows.append(row | judge_choices(scores, number, part))
    return rows


def means(results: Sequence[str]) -> dict[str, list[str]]:
    """List the results that each mean averages: the files of each kind of change, and all files; each weighs alike.

    Args:
        results: the names `sugarcrepe/CHANGE/METHOD` of what was measured.
    """
    groups: dict[str, list[str]] = {}
    for result in results:
        _, change, method = result.split("/")
        # "add_att" is of the kind "add".
        for group in (change.partition("_")[0], "mean"):
            groups.setdefault(f"sugarcrepe/{group}/{method}", []).append(result)
    return groups


def find(data: Path) -> list[Path]:
    """Find the files that are there."""
    paths = [data / "sugarcrepe" / f"{change}.json" for change in CHANGES]
    return list(filter(Path.is_file, paths))


SUGARCREPE = Suite(
    name="sugarcrepe",
    measures="an image's caption against one with a small change, by embedding and by likelihood",
    files=(
        "sugarcrepe/{" + ",".join(CHANGES) + "}.json",
        "COCO val2017's images, in the folder itself, images/ or val2017/",
    ),
    download="github.com/RAIVNLab/sugar-crepe (data); cocodataset.org (2017 Val images); "
    "a small version is written by `cafe scenes write DIR`",
    sources=("arXiv 2306.14610",),
    find_files=find,
    run=run,
    default=False,
    headline=("sugarcrepe/mean/embedding", "sugarcrepe/mean/likelihood"),
    labels={
        "sugarcrepe/mean/embedding": "SugarCrepe, by embedding",
        "sugarcrepe/mean/likelihood": "SugarCrepe, by likelihood",
    },
)
