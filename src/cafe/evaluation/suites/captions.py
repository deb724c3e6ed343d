"""Captions that are exactly right and the objects they mention, where all right captions and objects are known."""

from pathlib import Path
from typing import Any

from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.io import NUM_SAMPLES, ask_about_images, by_pattern, json_lines, require_texts, sample_image
from cafe.evaluation.metrics import mentioned_objects
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate

MAX_NEW_TOKENS = 96
FIELDS = {"image": str, "text": str, "answers": list, "objects": list}


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Ask for a description of each image."""
    (path,) = find(data)
    records = json_lines(path, FIELDS)
    require_texts(path, records, "answers", "objects")
    # Of all records: an object that no image within the limit shows can still be hallucinated.
    vocabulary = {term for record in records for term in record["objects"]}
    records = records[:limit]
    outputs = []
    for record, row in zip(records, ask_about_images(model, data, path, records, MAX_NEW_TOKENS), strict=True):
        mentioned = mentioned_objects(row["said"], vocabulary)
        present = set(record["objects"])
        # A caption may be exactly right in any of several wordings.
        marks = {"captions/exact": int(row["said"] in record["answers"]), **contributions(mentioned, present)}
        outputs.append({**row, "mentioned": sorted(mentioned), "objects": sorted(present), "marks": marks})
    # For the report: the first captions, with whether they are right.
    samples = [
        {"image": sample_image(row["image"], data), "said": row["said"], "right": bool(row["marks"]["captions/exact"])}
        for row in outputs[:NUM_SAMPLES]
    ]
    return EvaluationResult(aggregate(outputs), {"captions": outputs}, {"captions": samples})


def contributions(mentioned: set[str], present: set[str]) -> dict[str, Any]:
    """Compute what the objects that a caption mentions contribute to each result."""
    correct = len(mentioned & present)
    # Each result is a sum of numerators over a sum of denominators, over all captions.
    return {
        "objects/precision": [correct, len(mentioned)],
        "objects/recall": [correct, len(present)],
        "objects/hallucinated": [len(mentioned) - correct, len(mentioned)],
    }


find = by_pattern("captions_test.jsonl")

CAPTIONS = Suite(
    name="captions",
    measures="captions that are exactly right, and objects mentioned that are not there",
    files=(
        "captions_test.jsonl: image, text (the prompt), answers (all right captions), objects (all objects present)",
    ),
    download="written by `cafe scenes write DIR`, or by hand for images of which everything is known",
    find_files=find,
    run=run,
    headline=("captions/exact", "objects/recall", "objects/hallucinated"),
    generation=("objects/hallucinated",),
    lower_is_better=("objects/hallucinated",),
    labels={
        "captions/exact": "Captions exactly right",
        "objects/recall": "Objects mentioned",
        "objects/hallucinated": "Objects hallucinated",
    },
)
