"""Short answers to questions about pictures, by category of question."""

from pathlib import Path

from cafe.evaluation.subject import Subject
from cafe.evaluation.suite import KEPT, Evaluation, Suite, ask, by_pattern, json_lines, rates

LONGEST = 16  # tokens of an answer
FIELDS = {"image": str, "text": str, "answer": str, "category": str}


def run(model: Subject, data: Path, limit: int | None) -> Evaluation:
    """Asks each question; an answer is right if it is the expected one, in upper or lower case."""
    (path,) = find(data)
    rows = json_lines(path, FIELDS)[:limit]
    outputs = []
    for row, begun in zip(rows, ask(model, data, path, rows, LONGEST), strict=True):
        right = int(begun["said"].lower() == row["answer"].lower())
        marks = {"vqa/all": right, f"vqa/{row['category']}": right}
        outputs.append({**begun, "answer": row["answer"], "marks": marks})
    measured = rates(outputs)
    results = {name: measured[name] for name in ("vqa/all", *sorted(set(measured) - {"vqa/all"}))}
    shown = [
        {**{key: row[key] for key in ("image", "asked", "said", "answer")}, "right": bool(row["marks"]["vqa/all"])}
        for row in outputs[: 2 * KEPT : 2]
    ]
    return Evaluation(results, {"vqa": outputs}, {"answers": shown})


find = by_pattern("vqa_test.jsonl")

VQA = Suite(
    name="vqa",
    measures="short answers to questions about pictures, by category",
    files=("vqa_test.jsonl: image, text (the question), answer, category",),
    where="written by `cafe scenes write DIR`, or by hand",
    find=find,
    run=run,
)
