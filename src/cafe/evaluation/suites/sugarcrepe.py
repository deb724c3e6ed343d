"""SugarCrepe: a picture's caption against one that is changed in a small, plausible way (arXiv 2306.14610).

Seven files: an attribute or object added; an attribute, object or relation replaced; attributes or objects swapped.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate, find_image, json_records, mean_of
from cafe.evaluation.suites.choices import judge_choices, score

CHANGES = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
FIELDS = {"filename": str, "caption": str, "negative_caption": str}


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Measures every file that is there, the first `limit` records of each."""
    done = EvaluationResult()
    for path in find(data):
        records = json_records(path, FIELDS)[:limit]
        at = [find_image(record["filename"], data, path, "val2017") for record in records]
        captions = [(record["caption"], record["negative_caption"]) for record in records]
        scores = score(model, [data / picture for picture in at], captions)
        rows: list[dict[str, Any]] = []
        for number, (picture, (right, wrong)) in enumerate(zip(at, captions, strict=True)):
            row = {"id": number, "group": str(picture), "image": str(picture), "caption": right, "negative": wrong}
            rows.append(row | judge_choices(scores, number, f"sugarcrepe/{path.stem}"))
        done.outputs[f"sugarcrepe/{path.stem}"] = rows
        done.results |= aggregate(rows)
    for name, of in means(list(done.results)).items():
        mean_of(done, name, of)
    return done


def means(results: Sequence[str]) -> dict[str, list[str]]:
    """Which results each mean is of: the files of each kind of change, and all; each file weighs alike."""
    groups: dict[str, list[str]] = {}
    for result in results:
        _, change, way = result.split("/")
        for group in (change.partition("_")[0], "mean"):
            groups.setdefault(f"sugarcrepe/{group}/{way}", []).append(result)
    return groups


def find(data: Path) -> list[Path]:
    """The files that are there."""
    return [path for change in CHANGES if (path := data / "sugarcrepe" / f"{change}.json").is_file()]


SUGARCREPE = Suite(
    name="sugarcrepe",
    measures="a picture's caption against one with a small change, by embedding and by likelihood",
    files=(
        "sugarcrepe/{" + ",".join(CHANGES) + "}.json",
        "COCO val2017's pictures, in the folder itself, images/ or val2017/",
    ),
    download="github.com/RAIVNLab/sugar-crepe (data); cocodataset.org (2017 Val images); "
    "written small by `cafe scenes write DIR`",
    sources=("arXiv 2306.14610",),
    find_files=find,
    run=run,
    default=False,
)
