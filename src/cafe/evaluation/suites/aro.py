"""ARO: do relations, attributes and the order of words in a caption matter? (arXiv 2210.01936)

Visual Genome - Relation swaps the two things of a relation, Visual Genome - Attribution the attributes of two things.
The picture is cut to the box that holds both. Their result is over all records; `macro` is its mean over pairs of
attributes that come at least 25 times, as the authors report it, or over all relations. (The authors leave out a list
of those, which they call symmetric.)

COCO-Order and Flickr30k-Order set each caption of Karpathy's test split against up to four other orders of its words
(`word_order`), which are made as they are asked. `chance` is what guessing is right in: 20% where all four differ.
Captions without another order are `left_out`, by number. The authors count these, and orders that chance left as they
were, for the model.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from cafe.content import ImageRef
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate, find_image, json_records
from cafe.evaluation.suites.choices import AT_ONCE, WAYS, judge_choices, score
from cafe.evaluation.suites.retrieval import FLICKR, MSCOCO, RetrievalDataset
from cafe.evaluation.suites.word_order import Tagger, candidates, spacy_tags
from cafe.images.decoding import decode_image

PARTS = ("relation", "attribution")
FIELDS = {name: str for name in ("image_path", "true_caption", "false_caption")} | {
    f"bbox_{side}": (int, float) for side in "xywh"
}
LEAST = {"relation": 1, "attribution": 25}  # records of a kind that enter the mean over kinds
# A folder of its own: the same files may lie beside it for retrieval, and a long suite waits to be asked for.
ORDERS = tuple(
    RetrievalDataset(f"{home.name}_order", (f"aro/dataset_{home.name}.json",), folders=home.folders)
    for home in (MSCOCO, FLICKR)
)


def run(model: CachedModel, data: Path, limit: int | None, tag: Tagger = spacy_tags) -> EvaluationResult:
    """Measures each part that is there, the first `limit` records or pictures of each.

    Raises:
        CafeError: a file is not what it should be, or there is no tagger for the order of words.
    """
    done = EvaluationResult()
    for home in ORDERS:  # first: without a tagger they end the run
        if home.find(data):
            done.add(_order(model, data, home, limit, tag))
    for path in _visual_genome(data):
        part = path.stem.rsplit("_", 1)[-1]
        records = json_records(path, FIELDS)[:limit]
        rows: list[dict[str, Any]] = []
        for start in range(0, len(records), AT_ONCE):
            rows += _measure(model, data, path, part, records[start : start + AT_ONCE], start)
        done.outputs[f"aro/{part}"] = rows
        done.results |= aggregate(rows)
        means = {way: macro(rows, f"aro/{part}/{way}", LEAST[part]) for way in WAYS}
        done.results |= {f"aro/{part}/macro_{way}": mean for way, mean in means.items() if mean is not None}
    return done


def _measure(
    model: CachedModel, data: Path, path: Path, part: str, records: list[dict[str, Any]], start: int
) -> list[dict[str, Any]]:
    at = [find_image(record["image_path"], data, path, "aro/images", "aro") for record in records]
    captions = [(record["true_caption"], record["false_caption"]) for record in records]
    empty = next((start + n for n, box in enumerate(records, 1) if min(box["bbox_w"], box["bbox_h"]) < 1), None)
    if empty:
        raise CafeError(f"The box of record {empty} of {path} holds nothing of the picture.")
    crops = [cut(data / picture, record) for picture, record in zip(at, records, strict=True)]
    scores = score(model, crops, captions)
    rows = []
    for number, (record, picture) in enumerate(zip(records, at, strict=True)):
        row = {"id": start + number, "group": str(picture), "image": str(picture), "kind": kind(record)}
        row |= {"caption": captions[number][0], "negative": captions[number][1]}
        rows.append(row | judge_choices(scores, number, f"aro/{part}"))
    return rows


def _order(model: CachedModel, data: Path, home: RetrievalDataset, limit: int | None, tag: Tagger) -> EvaluationResult:
    name, collection = f"aro/{home.name}", home.read(data, limit)
    captions = [candidates(words) for words in tag(collection.texts)]
    asked = [number for number, some in enumerate(captions) if len(some) > 1]
    owners = collection.owner[asked]
    scores = score(model, [collection.pictures[owner] for owner in owners], [captions[number] for number in asked])
    rows = []
    for place, (number, owner) in enumerate(zip(asked, owners, strict=True)):
        picture = collection.names[owner]
        row = {"id": number, "group": picture, "image": picture, "captions": captions[number]}
        row |= judge_choices(scores, place, name)
        row["marks"][f"{name}/chance"] = 1 / len(captions[number])
        rows.append(row)
    return EvaluationResult(aggregate(rows) | {f"{name}/left_out": len(captions) - len(asked)}, {name: rows})


def cut(path: Path, record: dict[str, Any]) -> ImageRef:
    """The picture within the record's box."""
    left, top, width, height = (record[f"bbox_{name}"] for name in "xywh")
    return ImageRef(decode_image(ImageRef(path)).crop((left, top, left + width, top + height)))


def kind(record: dict[str, Any]) -> str:
    """The relation, or the pair of attributes, that a record is about."""
    return record["relation_name"] if "relation_name" in record else "_".join(record.get("attributes", ()))


def macro(rows: list[dict[str, Any]], mark: str, least: int) -> float | None:
    """The mean over kinds of the share that is right, in percent; None where no kind comes often enough."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row["marks"][mark])
    shares = [float(np.mean(marks)) for marks in kinds.values() if len(marks) >= least]
    return 100 * float(np.mean(shares)) if shares else None


def find(data: Path) -> list[Path]:
    """The files of the parts that are there."""
    return [*_visual_genome(data), *(path for home in ORDERS for path in home.find(data))]


def _visual_genome(data: Path) -> list[Path]:
    return [path for part in PARTS if (path := data / "aro" / f"visual_genome_{part}.json").is_file()]


ARO = Suite(
    name="aro",
    measures="a true caption against one with its relation or its attributes swapped, or its words in other orders, by "
    "embedding and by likelihood",
    files=(
        "aro/visual_genome_relation.json, aro/visual_genome_attribution.json",
        "their pictures, in aro/images/",
        "aro/dataset_coco.json, aro/dataset_flickr30k.json (Karpathy): for the order of words, which needs spaCy",
        "their pictures, in val2014/, flickr30k-images/ or images/",
    ),
    download="github.com/mertyg/vision-language-models-are-bows; cs.stanford.edu/people/karpathy/deepimagesent; "
    "its first two written small by `cafe scenes write DIR`",
    sources=("arXiv 2210.01936",),
    find_files=find,
    run=run,
    default=False,
)
