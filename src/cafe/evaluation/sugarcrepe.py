"""SugarCrepe: a picture's caption against one that is changed in a small, plausible way (arXiv 2306.14610).

Seven files: an attribute or object added; an attribute, object or relation replaced; attributes or objects swapped.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cafe.errors import CafeError
from cafe.evaluation.choices import WAYS, ahead, score
from cafe.evaluation.subject import Subject
from cafe.evaluation.suite import Evaluation, Suite, find_picture, mean_of, rates

CHANGES = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
FIELDS = ("filename", "caption", "negative_caption")


def run(model: Subject, data: Path, limit: int | None) -> Evaluation:
    """Measures every file that is there, the first `limit` records of each."""
    done = Evaluation()
    for path in find(data):
        records = read(path)[:limit]
        at = [find_picture(record["filename"], data, path, "val2017") for record in records]
        captions = [(record["caption"], record["negative_caption"]) for record in records]
        scores = score(model, [data / picture for picture in at], captions)
        rows: list[dict[str, Any]] = []
        for number, (picture, (right, wrong)) in enumerate(zip(at, captions, strict=True)):
            found = {way: scores[way][number] for way in WAYS}
            row = {"id": number, "group": str(picture), "image": str(picture), "caption": right, "negative": wrong}
            row["scores"] = {way: found[way].tolist() for way in WAYS}
            marks = {f"sugarcrepe/{path.stem}/{way}": int(ahead(found[way], way)) for way in WAYS}
            rows.append({**row, "marks": marks})
        done.outputs[f"sugarcrepe/{path.stem}"] = rows
        done.results |= rates(rows)
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


def read(path: Path) -> list[dict[str, str]]:
    """The records of one of SugarCrepe's files: a JSON object of them by number.

    Raises:
        CafeError: it is not of that form.
    """
    try:
        rows = list(json.loads(path.read_text()).values())
        complete = bool(rows) and all(isinstance(row[name], str) for row in rows for name in FIELDS)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CafeError(f"The evaluation file {path} is not a SugarCrepe file: {error!r}.") from None
    if not complete:
        raise CafeError(
            f"The evaluation file {path} is not a SugarCrepe file: a record lacks one of {', '.join(FIELDS)}."
        )
    return rows


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
    where="github.com/RAIVNLab/sugar-crepe (data); cocodataset.org (2017 Val images)",
    sources=("arXiv 2306.14610",),
    find=find,
    run=run,
    usual=False,
)
