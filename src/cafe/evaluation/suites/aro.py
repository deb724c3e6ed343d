"""ARO: do relations, attributes and the order of words in a caption matter? (arXiv 2210.01936)

Visual Genome - Relation swaps the two things of a relation, Visual Genome - Attribution the attributes of two things.
The image is cropped to the box that holds both. Their result is over all records; `macro` is its mean over pairs of
attributes that come at least 25 times, as the authors report it, or over all relations. (The authors leave out a list
of those, which they call symmetric.)

COCO-Order and Flickr30k-Order set each caption of Karpathy's test split against up to four other orders of its words
(`word_order`), made on the fly. `chance` is the accuracy of guessing: 20% if all four differ. Captions without another
order are counted as `left_out`. The authors count these, and orders that chance left as they were, for the model.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from cafe.content import ImageRef
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.io import Fields, find_image, json_records
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate
from cafe.evaluation.suites.captioned_images import COCO_DATASET, FLICKR30K_DATASET, RetrievalDataset
from cafe.evaluation.suites.choices import METHODS, NUM_AT_ONCE, judge_choices, score
from cafe.evaluation.suites.word_order import Tagger, candidates, spacy_tags
from cafe.images.decoding import decode_image

PARTS = ("relation", "attribution")
MAX_COORDINATE = 10_000  # pixels; what Pillow crops beyond an image is black, but takes memory
MIN_RECORDS = {"relation": 1, "attribution": 25}  # of a kind that enters the mean over kinds
FIELDS: Fields = {
    **dict.fromkeys(("image_path", "true_caption", "false_caption"), str),
    **dict.fromkeys(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), (int, float)),
}
# In a folder of its own: the same files may be next to it for retrieval, and a long suite should only run when named.
ORDERS = tuple(
    RetrievalDataset(f"{dataset.name}_order", (f"aro/dataset_{dataset.name}.json",), folders=dataset.folders)
    for dataset in (COCO_DATASET, FLICKR30K_DATASET)
)


def run(model: CachedModel, data: Path, limit: int | None, tag: Tagger = spacy_tags) -> EvaluationResult:
    """Measure each part that is there, the first `limit` records or images of each.

    Raises:
        CafeError: a file is malformed.
        MissingPackageError: the order of words needs a tagger that is not installed.
    """
    result = EvaluationResult()
    for dataset in ORDERS:  # first, so that a missing tagger is reported before hours of work
        if dataset.find(data):
            result.add(_measure_order(model, data, dataset, limit, tag))
    for path in _visual_genome_files(data):
        result.add(_measure_visual_genome(model, data, path, limit))
    return result


def _measure_visual_genome(model: CachedModel, data: Path, path: Path, limit: int | None) -> EvaluationResult:
    """Measure one of the two files of records with boxes."""
    name = path.stem.rsplit("_", 1)[-1]
    part = f"aro/{name}"
    records = json_records(path, FIELDS)[:limit]
    rows: list[dict[str, Any]] = []
    # A part of the records at a time, because their crops are in memory.
    for start in range(0, len(records), NUM_AT_ONCE):
        rows += _judge_records(model, data, path, part, records[start : start + NUM_AT_ONCE], start)
    result = EvaluationResult(aggregate(rows), {part: rows})
    for method in METHODS:
        mean = macro(rows, f"{part}/{method}", MIN_RECORDS[name])
        if mean is not None:
            result.results[f"{part}/macro_{method}"] = mean
    return result


def _judge_records(
    model: CachedModel, data: Path, path: Path, part: str, records: list[dict[str, Any]], start: int
) -> list[dict[str, Any]]:
    """Score the two captions of each record.

    Args:
        model: the model.
        data: the folder of evaluation files.
        path: the records' file.
        part: begins the names of the results.
        records: some of the file's records.
        start: the number of the first of them.
    """
    images = [find_image(record["image_path"], data, path, "aro/images", "aro") for record in records]
    captions = [(record["true_caption"], record["false_caption"]) for record in records]
    for number, record in enumerate(records, start + 1):
        sides = [record[name] for name in ("bbox_x", "bbox_y", "bbox_w", "bbox_h")]
        if not all(abs(side) <= MAX_COORDINATE for side in sides) or min(sides[2:]) < 1:  # NaN is not below either
            raise CafeError(f"The box of record {number} of {path} holds nothing of the image.")
    crops = [crop(data / image, record) for image, record in zip(images, records, strict=True)]
    scores = score(model, crops, captions)
    rows = []
    for number, (record, image) in enumerate(zip(records, images, strict=True)):
        # The id is the record's number in the file, not in this part of it.
        row = {"id": start + number, "group": str(image), "image": str(image), "kind": kind(record)}
        row |= {"caption": record["true_caption"], "negative": record["false_caption"]}
        rows.append(row | judge_choices(scores, number, part))
    return rows


def _measure_order(
    model: CachedModel, data: Path, dataset: RetrievalDataset, limit: int | None, tag: Tagger
) -> EvaluationResult:
    """Set each caption against other orders of its words.

    Args:
        model: the model.
        data: the folder of evaluation files.
        dataset: the captions.
        limit: the number of images; all of them if None.
        tag: finds the nouns and adjectives.
    """
    part = f"aro/{dataset.name}"
    captioned = dataset.read(data, limit)
    choices = [candidates(tagged) for tagged in tag(captioned.texts)]
    # A caption without another order is no question.
    asked = [number for number, texts in enumerate(choices) if len(texts) > 1]
    owners = captioned.owner[asked]  # an image comes once for each of its captions; it is embedded once
    scores = score(model, [captioned.images[owner] for owner in owners], [choices[number] for number in asked])
    rows = []
    for position, (number, owner) in enumerate(zip(asked, owners, strict=True)):
        image = captioned.names[owner]
        # The id counts all captions, also those left out.
        row = {"id": number, "group": image, "image": image, "captions": choices[number]}
        row |= judge_choices(scores, position, part)
        # Averaged over the captions, since they have from one to four other orders.
        row["marks"][f"{part}/chance"] = 1 / len(choices[number])
        rows.append(row)
    left_out = len(choices) - len(asked)
    return EvaluationResult(aggregate(rows) | {f"{part}/left_out": left_out}, {part: rows})


def crop(path: Path, record: dict[str, Any]) -> ImageRef:
    """Crop an image to the record's box."""
    left, top, width, height = (record[f"bbox_{name}"] for name in "xywh")
    image = decode_image(ImageRef(path))
    # Pillow takes the right and lower edges, not the box's size.
    return ImageRef(image.crop((left, top, left + width, top + height)))


def kind(record: dict[str, Any]) -> str:
    """Name the relation, or the pair of attributes, that a record is about."""
    if "relation_name" in record:
        return str(record["relation_name"])
    attributes = record.get("attributes", ())
    return "_".join(map(str, attributes if isinstance(attributes, list) else [attributes]))


def macro(rows: list[dict[str, Any]], result: str, min_records: int) -> float | None:
    """Average over kinds the fraction that is right, in percent; None if no kind comes often enough.

    Args:
        rows: the output rows.
        result: the mark that says whether a row is right.
        min_records: how often a kind must come to be averaged.
    """
    marks_by_kind: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        marks_by_kind[row["kind"]].append(row["marks"][result])
    accuracies = [float(np.mean(marks)) for marks in marks_by_kind.values() if len(marks) >= min_records]
    if not accuracies:
        return None
    return 100 * float(np.mean(accuracies))


def find(data: Path) -> list[Path]:
    """Find the files of the parts that are there."""
    paths = _visual_genome_files(data)
    for dataset in ORDERS:
        paths += dataset.find(data)
    return paths


def _visual_genome_files(data: Path) -> list[Path]:
    """Find the files of records with boxes."""
    paths = [data / "aro" / f"visual_genome_{part}.json" for part in PARTS]
    return list(filter(Path.is_file, paths))


ARO = Suite(
    name="aro",
    measures="a true caption against one with its relation or its attributes swapped, or its words in other orders, by "
    "embedding and by likelihood",
    files=(
        "aro/visual_genome_relation.json, aro/visual_genome_attribution.json",
        "their images, in aro/images/",
        "aro/dataset_coco.json, aro/dataset_flickr30k.json (Karpathy): for the order of words, which needs spaCy",
        "their images, in val2014/, flickr30k-images/ or images/",
    ),
    download="github.com/mertyg/vision-language-models-are-bows; cs.stanford.edu/people/karpathy/deepimagesent; "
    "a small version of the first two is written by `cafe scenes write DIR`",
    sources=("arXiv 2210.01936",),
    find_files=find,
    run=run,
    default=False,
    headline=(
        *("aro/relation/embedding", "aro/relation/likelihood"),
        *("aro/attribution/embedding", "aro/attribution/likelihood"),
    ),
    no_direction=("aro/*/chance", "aro/*/left_out"),
    labels={
        "aro/relation/embedding": "ARO relations, by embedding",
        "aro/relation/likelihood": "ARO relations, by likelihood",
        "aro/attribution/embedding": "ARO attributes, by embedding",
        "aro/attribution/likelihood": "ARO attributes, by likelihood",
    },
)
