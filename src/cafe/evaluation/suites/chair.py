"""CHAIR: objects that a description mentions and the image does not show (arXiv 1809.02156).

CHAIR-i is the fraction of mentioned objects that are absent, CHAIR-s the fraction of descriptions that mention an
absent object. The objects of an image are those of COCO's instances and, if that file exists, of COCO's captions. A
model that says nothing has the best CHAIR, so recall and the number of mentions per description are reported too.
"""

from pathlib import Path
from typing import Any

from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate
from cafe.evaluation.suites.coco import describe_images, find_instances, read_captions, read_instances

YEAR = "val2014"
PROMPT = "Please describe this image in detail."
MAX_NEW_TOKENS = 512


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Ask for a description of each of the first `limit` images."""
    source = find(data)[0]
    images = read_instances(source, limit)
    # People's captions name objects that COCO's boxes leave out.
    captions = source.with_name(source.name.replace("instances", "captions"))
    in_captions = read_captions(captions, images) if captions.is_file() else {}
    rows = []
    for number, path, description in describe_images(model, data, images, YEAR, PROMPT, MAX_NEW_TOKENS):
        # An object is present if either annotates it.
        present = images.objects[number] | in_captions.get(number, set())
        mentioned = images.vocabulary.mentions(description)
        row = {"id": number, "group": str(path), "image": str(path), "said": description, "mentioned": mentioned}
        rows.append({**row, "objects": sorted(present), "marks": contributions(mentioned, present)})
    # A mean and no rate, so it is not made of marks.
    results = aggregate(rows) | {"chair/mentions": mentions(rows)}
    return EvaluationResult(results, {"chair": rows})


def contributions(mentioned: list[str], present: set[str]) -> dict[str, Any]:
    """Compute what a description contributes to each result.

    Args:
        mentioned: the class of each mention, as often as it is made.
        present: the classes that the image shows.
    """
    # A class that is mentioned twice is hallucinated twice, but recalled once.
    num_absent = sum(name not in present for name in mentioned)
    return {
        "chair/CHAIR_i": [num_absent, len(mentioned)],
        "chair/CHAIR_s": int(num_absent > 0),
        "chair/recall": [len(present & set(mentioned)), len(present)],
    }


def mentions(rows: list[dict[str, Any]]) -> float:
    """Compute the mean number of objects that a description mentions."""
    return sum(len(row["mentioned"]) for row in rows) / len(rows)


def find(data: Path) -> list[Path]:
    """Find COCO's instances, of 2014 if there are several."""
    return find_instances(data, YEAR)


CHAIR = Suite(
    name="chair",
    measures="objects that a free description mentions and the image does not show",
    files=(
        "annotations/instances_val2014.json: COCO's objects, or a file of your own in this format",
        "annotations/captions_val2014.json: COCO's captions, which name objects too (optional)",
        "annotations/synonyms.txt: words for each class in place of the authors' (optional)",
        "the images, in the folder itself, images/ or val2014/",
    ),
    download="cocodataset.org (2014 Train/Val annotations, 2014 Val images); "
    "github.com/LisaAnne/Hallucination (words); a small version is written by `cafe scenes write DIR`",
    sources=("arXiv 1809.02156",),
    find_files=find,
    run=run,
    default=False,
    headline=("chair/CHAIR_i",),
    generation=("chair/CHAIR_i",),
    lower_is_better=("chair/CHAIR_i", "chair/CHAIR_s"),
    no_direction=("chair/mentions",),
    labels={"chair/CHAIR_i": "CHAIR, mentions hallucinated"},
)
