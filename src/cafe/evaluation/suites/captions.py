"""Captions that are exactly right and the objects they mention, where all right captions and objects are known."""

from pathlib import Path

from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.metrics import mentioned_objects
from cafe.evaluation.suite import (
    NUM_SAMPLES,
    EvaluationResult,
    Suite,
    aggregate,
    ask_about_images,
    by_pattern,
    json_lines,
)

MAX_NEW_TOKENS = 96  # tokens of a caption
FIELDS = {"image": str, "text": str, "answers": list, "objects": list}


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Asks for a description of each picture."""
    (path,) = find(data)
    every = json_lines(path, FIELDS)
    rows, vocabulary = every[:limit], {word for row in every for word in row["objects"]}
    outputs = []
    for row, begun in zip(rows, ask_about_images(model, data, path, rows, MAX_NEW_TOKENS), strict=True):
        mentioned, present = mentioned_objects(begun["said"], vocabulary), set(row["objects"])
        true = len(mentioned & present)
        marks = {
            "captions/exact": int(begun["said"] in row["answers"]),
            "objects/precision": [true, len(mentioned)],
            "objects/recall": [true, len(present)],
            "objects/hallucinated": [len(mentioned) - true, len(mentioned)],
        }
        outputs.append({**begun, "mentioned": sorted(mentioned), "objects": sorted(present), "marks": marks})
    shown = [
        {"image": row["image"], "said": row["said"], "right": bool(row["marks"]["captions/exact"])}
        for row in outputs[:NUM_SAMPLES]
    ]
    return EvaluationResult(aggregate(outputs), {"captions": outputs}, {"captions": shown})


find = by_pattern("captions_test.jsonl")

CAPTIONS = Suite(
    name="captions",
    measures="captions that are exactly right, and objects mentioned that are not there",
    files=("captions_test.jsonl: image, text (what to ask), answers (all that are right), objects (all there are)",),
    download="written by `cafe scenes write DIR`, or by hand for pictures of which everything is known",
    find_files=find,
    run=run,
)
