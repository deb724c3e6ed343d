"""Short answers to questions about pictures, by category of question."""

from pathlib import Path

from cafe.evaluation.subject import Subject
from cafe.evaluation.suite import KEPT, Evaluation, Suite, ask, by_pattern, json_lines, rates

LONGEST = 16  # tokens of an answer


def run(model: Subject, data: Path, limit: int | None) -> Evaluation:
    """Asks each question; an answer is right if it is the expected one, in upper or lower case."""
    (path,) = find(data)
    rows = json_lines(path, ("image", "text", "answer", "category"))[:limit]
    pictures, said = ask(model, data, path, rows, LONGEST)
    outputs = []
    for number, (row, picture, text) in enumerate(zip(rows, pictures, said, strict=True)):
        right = int(text.lower() == row["answer"].lower())
        outputs.append(
            {
                "id": row.get("question_id", number),
                "group": str(picture),
                "image": str(picture),
                "asked": row["text"],
                "said": text,
                "answer": row["answer"],
                "marks": {"vqa/all": right, f"vqa/{row['category']}": right},
            }
        )
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
