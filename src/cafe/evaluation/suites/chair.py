"""CHAIR: objects that a description mentions and the picture does not show (arXiv 1809.02156).

CHAIR-i is the share of mentioned objects that are not there, CHAIR-s the share of descriptions that mention such a one.
What is there is what COCO's instances say and, where they are given too, its captions. A model that says nothing has
the best CHAIR, so the recall of objects and the mentions a description stand beside it.
"""

from pathlib import Path
from typing import Any

from cafe.content import Content, ImageRef
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate, find_image
from cafe.evaluation.suites.coco import find_instances, read_captions, read_instances

YEAR = "val2014"
PROMPT = "Please describe this image in detail."
MAX_NEW_TOKENS = 512  # tokens of a description


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Asks for a description of each of the first `limit` pictures."""
    source = find(data)[0]
    pictures = read_instances(source, limit)
    captions = source.with_name(source.name.replace("instances", "captions"))
    mentioned = read_captions(captions, pictures) if captions.is_file() else {}
    at = {number: find_image(name, data, source, YEAR) for number, name in pictures.names.items()}
    ask = pictures.prompt or PROMPT
    said = model.generate([Content((ImageRef(data / path), ask)) for path in at.values()], MAX_NEW_TOKENS)
    rows = []
    for (number, path), text in zip(at.items(), said, strict=True):
        present = pictures.objects[number] | mentioned.get(number, set())
        named = pictures.vocabulary.mentions(text)
        row = {"id": number, "group": str(path), "image": str(path), "said": text}
        rows.append({**row, "mentioned": named, "objects": sorted(present), "marks": contributions(named, present)})
    return EvaluationResult(aggregate(rows) | {"chair/mentions": mentions(rows)}, {"chair": rows})


def contributions(mentioned: list[str], present: set[str]) -> dict[str, Any]:
    """What a description counts for: the class of each mention, as often as it is made, and the classes there are."""
    wrong = sum(name not in present for name in mentioned)
    return {
        "chair/CHAIR_i": [wrong, len(mentioned)],
        "chair/CHAIR_s": int(wrong > 0),
        "chair/recall": [len(present & set(mentioned)), len(present)],
    }


def mentions(rows: list[dict[str, Any]]) -> float:
    """Mentions of objects a description."""
    return sum(len(row["mentioned"]) for row in rows) / len(rows)


def find(data: Path) -> list[Path]:
    """COCO's instances, of 2014 where there are several."""
    path = find_instances(data, YEAR)
    return [path] if path else []


CHAIR = Suite(
    name="chair",
    measures="objects that a free description mentions and the picture does not show",
    files=(
        "annotations/instances_val2014.json: COCO's objects; a file of your own in this format does too",
        "annotations/captions_val2014.json: COCO's captions, which name objects too (may be left out)",
        "annotations/synonyms.txt: CHAIR's own list of words (may be left out)",
        "the pictures, in the folder itself, images/ or val2014/",
    ),
    download="cocodataset.org (2014 Train/Val annotations, 2014 Val images); github.com/LisaAnne/Hallucination (words); "
    "written small by `cafe scenes write DIR`",
    sources=("arXiv 1809.02156",),
    find_files=find,
    run=run,
    default=False,
)
