"""ARO: do relations and attributes in a caption matter? (arXiv 2210.01936)

Visual Genome - Relation swaps the two things of a relation, Visual Genome - Attribution the attributes of two things.
The picture is cut to the box that holds both. `accuracy` is over all records; `macro` is its mean over relations, or
over pairs of attributes that come at least 25 times, as the authors report it.

ARO's two other parts, the order of words in COCO's and Flickr30K's captions, are not here: their files are not
published but made by chance at run time, with a part-of-speech tagger.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from cafe.content import ImageRef, open_image
from cafe.evaluation.choices import AT_ONCE, WAYS, judged, score
from cafe.evaluation.subject import Subject
from cafe.evaluation.suite import Evaluation, Suite, find_picture, json_records, rates

PARTS = ("relation", "attribution")
FIELDS = ("image_path", "true_caption", "false_caption", "bbox_x", "bbox_y", "bbox_w", "bbox_h")
LEAST = {"relation": 1, "attribution": 25}  # records of a kind that enter the mean over kinds


def run(model: Subject, data: Path, limit: int | None) -> Evaluation:
    """Measures each part that is there, the first `limit` records of each."""
    done = Evaluation()
    for path in find(data):
        part = path.stem.rsplit("_", 1)[-1]
        records = json_records(path, FIELDS)[:limit]
        rows: list[dict[str, Any]] = []
        for start in range(0, len(records), AT_ONCE):
            rows += _measure(model, data, path, part, records[start : start + AT_ONCE], start)
        done.outputs[f"aro/{part}"] = rows
        done.results |= rates(rows)
        for way in WAYS:
            done.results[f"aro/{part}/macro_{way}"] = macro(rows, f"aro/{part}/{way}", LEAST[part])
    return done


def _measure(
    model: Subject, data: Path, path: Path, part: str, records: list[dict[str, Any]], start: int
) -> list[dict[str, Any]]:
    at = [find_picture(record["image_path"], data, path, "aro/images", "aro") for record in records]
    captions = [(record["true_caption"], record["false_caption"]) for record in records]
    crops = [cut(data / picture, record) for picture, record in zip(at, records, strict=True)]
    scores = score(model, crops, captions)
    rows = []
    for number, (record, picture) in enumerate(zip(records, at, strict=True)):
        row = {"id": start + number, "group": str(picture), "image": str(picture), "kind": kind(record)}
        row |= {"caption": captions[number][0], "negative": captions[number][1]}
        rows.append(row | judged(scores, number, f"aro/{part}"))
    return rows


def cut(path: Path, record: dict[str, Any]) -> ImageRef:
    """The picture within the record's box."""
    left, top, width, height = (record[f"bbox_{name}"] for name in "xywh")
    return ImageRef(open_image(ImageRef(path)).crop((left, top, left + width, top + height)))


def kind(record: dict[str, Any]) -> str:
    """The relation, or the pair of attributes, that a record is about."""
    return record["relation_name"] if "relation_name" in record else "_".join(record.get("attributes", ()))


def macro(rows: list[dict[str, Any]], mark: str, least: int) -> float:
    """The mean over kinds of the share that is right, in percent; 0 where no kind comes often enough."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row["marks"][mark])
    shares = [float(np.mean(marks)) for marks in kinds.values() if len(marks) >= least]
    return 100 * float(np.mean(shares)) if shares else 0.0


def find(data: Path) -> list[Path]:
    """The parts that are there."""
    return [path for part in PARTS if (path := data / "aro" / f"visual_genome_{part}.json").is_file()]


ARO = Suite(
    name="aro",
    measures="a true caption against one with its relation or its attributes swapped, by embedding and by likelihood",
    files=("aro/visual_genome_relation.json, aro/visual_genome_attribution.json", "their pictures, in aro/images/"),
    where="github.com/mertyg/vision-language-models-are-bows",
    sources=("arXiv 2210.01936",),
    find=find,
    run=run,
    usual=False,
)
