"""Captions that are exactly right and the objects they mention, where all right captions and objects are known."""

from pathlib import Path

from cafe.evaluation.metrics import mentioned_objects
from cafe.evaluation.subject import Subject
from cafe.evaluation.suite import KEPT, Evaluation, Suite, ask, by_pattern, json_lines, rates

LONGEST = 96  # tokens of a caption
FIELDS = {"image": str, "text": str, "answers": list, "objects": list}


def run(model: Subject, data: Path, limit: int | None) -> Evaluation:
    """Asks for a description of each picture."""
    (path,) = find(data)
    every = json_lines(path, FIELDS)
    rows, vocabulary = every[:limit], {word for row in every for word in row["objects"]}
    outputs = []
    for row, begun in zip(rows, ask(model, data, path, rows, LONGEST), strict=True):
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
        for row in outputs[:KEPT]
    ]
    return Evaluation(rates(outputs), {"captions": outputs}, {"captions": shown})


find = by_pattern("captions_test.jsonl")

CAPTIONS = Suite(
    name="captions",
    measures="captions that are exactly right, and objects mentioned that are not there",
    files=("captions_test.jsonl: image, text (what to ask), answers (all that are right), objects (all there are)",),
    where="written by `cafe scenes write DIR`, or by hand for pictures of which everything is known",
    find=find,
    run=run,
)
