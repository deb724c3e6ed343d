"""Short answers to questions about pictures, by category of question."""

from pathlib import Path

from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import (
    NUM_SAMPLES,
    EvaluationResult,
    Suite,
    aggregate,
    ask_about_images,
    by_pattern,
    json_lines,
)

MAX_NEW_TOKENS = 16  # tokens of an answer
FIELDS = {"image": str, "text": str, "answer": str, "category": str}


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Asks each question; an answer is right if it is the expected one, in upper or lower case."""
    (path,) = find(data)
    rows = json_lines(path, FIELDS)[:limit]
    outputs = []
    for row, begun in zip(rows, ask_about_images(model, data, path, rows, MAX_NEW_TOKENS), strict=True):
        right = int(begun["said"].lower() == row["answer"].lower())
        marks = {"vqa/all": right, f"vqa/{row['category']}": right}
        outputs.append({**begun, "answer": row["answer"], "marks": marks})
    measured = aggregate(outputs)
    results = {name: measured[name] for name in ("vqa/all", *sorted(set(measured) - {"vqa/all"}))}
    shown = [
        {**{key: row[key] for key in ("image", "asked", "said", "answer")}, "right": bool(row["marks"]["vqa/all"])}
        for row in outputs[: 2 * NUM_SAMPLES : 2]
    ]
    return EvaluationResult(results, {"vqa": outputs}, {"answers": shown})


find = by_pattern("vqa_test.jsonl")

VQA = Suite(
    name="vqa",
    measures="short answers to questions about pictures, by category",
    files=("vqa_test.jsonl: image, text (the question), answer, category",),
    download="written by `cafe scenes write DIR`, or by hand",
    find_files=find,
    run=run,
)
