"""Short answers to questions about images, by category of question."""

from pathlib import Path

from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.io import NUM_SAMPLES, ask_about_images, by_pattern, json_lines, sample_image
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate

MAX_NEW_TOKENS = 16
FIELDS = {"image": str, "text": str, "answer": str, "category": str}


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Ask each question; an answer is right if it equals the expected one, in upper or lower case."""
    (path,) = find(data)
    records = json_lines(path, FIELDS)[:limit]
    outputs = []
    for record, row in zip(records, ask_about_images(model, data, path, records, MAX_NEW_TOKENS), strict=True):
        correct = int(row["said"].lower() == record["answer"].lower())
        # A question counts for its category and for the whole.
        marks = {"vqa/all": correct, f"vqa/{record['category']}": correct}
        outputs.append({**row, "answer": record["answer"], "marks": marks})
    # The overall result first, then the categories by name.
    rates = aggregate(outputs)
    categories = sorted(set(rates) - {"vqa/all"})
    results = {name: rates[name] for name in ("vqa/all", *categories)}
    samples = []
    for row in outputs[: 2 * NUM_SAMPLES : 2]:  # neighboring questions are often about the same image
        sample = {key: row[key] for key in ("image", "asked", "said", "answer")}
        sample["image"] = sample_image(row["image"], data)
        samples.append({**sample, "right": bool(row["marks"]["vqa/all"])})
    return EvaluationResult(results, {"vqa": outputs}, {"answers": samples})


find = by_pattern("vqa_test.jsonl")

VQA = Suite(
    name="vqa",
    measures="short answers to questions about images, by category",
    files=("vqa_test.jsonl: image, text (the question), answer, category",),
    download="written by `cafe scenes write DIR`, or by hand",
    find_files=find,
    run=run,
    headline=("vqa/all",),
    generation=("vqa/all",),
    labels={"vqa": "Questions", "vqa/all": "Questions answered"},
)
