"""POPE: yes-or-no questions about objects that are or are not in an image (arXiv 2305.10355)."""

import re
from pathlib import Path
from typing import Any

from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.io import ask_about_images, by_pattern, json_lines
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate

SPLITS = ("random", "popular", "adversarial")
METRICS = ("accuracy", "precision", "recall", "F1", "yes_ratio", "strict_accuracy", "neither")
MAX_NEW_TOKENS = 8


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Ask the questions of each split that is there. A question that several splits share is asked once."""
    result = EvaluationResult()
    splits = {path: read(path)[:limit] for path in find(data)}
    answers = _ask(model, data, splits)
    for path, records in splits.items():
        part = f"pope/{path.stem.rsplit('_', 1)[-1]}"
        rows = []
        for number, record in enumerate(records):
            row, label = answers[record["image"], record["text"]], record["label"]
            marks = contributions(row["said"], label == "yes", part)
            # The id is that of this split, whichever split the question was asked for.
            rows.append({**row, "id": record.get("question_id", number), "label": label, "marks": marks})
        result.outputs[part] = rows
        result.results |= aggregate(rows)
    for metric in METRICS:
        result.add_mean(f"pope/mean/{metric}", [f"{part}/{metric}" for part in result.outputs])
    return result


def _ask(
    model: CachedModel, data: Path, splits: dict[Path, list[dict[str, Any]]]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Ask the questions of all splits.

    Args:
        model: the model.
        data: the folder of evaluation files.
        splits: by file, its questions.

    Returns:
        by image and text, the question's output row.
    """
    # The splits share half of their questions: those about objects that are present.
    questions: dict[tuple[str, str], dict[str, Any]] = {}
    for records in splits.values():
        questions |= {(record["image"], record["text"]): record for record in records}
    source = next(iter(splits))  # for errors; images are in the same place for all splits
    answered = ask_about_images(model, data, source, list(questions.values()), MAX_NEW_TOKENS, "val2014")
    return dict(zip(questions, answered, strict=True))


def read(path: Path) -> list[dict[str, Any]]:
    """Read the questions of a split.

    Raises:
        CafeError: a record lacks a field, or its label is neither yes nor no.
    """
    rows = json_lines(path, {"image": str, "text": str, "label": str})
    for number, row in enumerate(rows, 1):
        if row["label"] not in ("yes", "no"):
            raise CafeError(f"The label in record {number} of {path} should be yes or no, not {row['label']!r}.")
    return rows


def contributions(answer: str, is_present: bool, part: str) -> dict[str, Any]:
    """Compute what an answer contributes to each result, parsed as POPE does, and to the strict accuracy.

    F1 is written as 2 true positives over the "yes" answered plus the "yes" expected, so that it is a ratio of sums
    like the others.

    Args:
        answer: the model's answer.
        is_present: whether the right answer is yes.
        part: begins the names of the results.
    """
    says_yes, strict = parse_yes_no(answer), parse_strictly(answer)
    true_positive = int(says_yes and is_present)
    return {
        f"{part}/accuracy": int(says_yes == is_present),
        f"{part}/precision": [true_positive, int(says_yes)],
        f"{part}/recall": [true_positive, int(is_present)],
        f"{part}/F1": [2 * true_positive, int(says_yes) + int(is_present)],
        f"{part}/yes_ratio": int(says_yes),
        f"{part}/strict_accuracy": int(strict == is_present),
        f"{part}/neither": int(strict is None),
    }


def parse_yes_no(answer: str) -> bool:
    """Parse an answer as POPE does: "no" if its first sentence has the word No, not or no, otherwise "yes"."""
    # Case and spaces matter, as in the official script: "NO" and "No!" count as yes.
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def parse_strictly(answer: str) -> bool | None:
    """Parse an answer that says yes (True) or no (False) explicitly; None if it says neither, or both.

    An answer that begins with either word, in upper or lower case, means it; any other must contain exactly one of
    the two. "There is not" says neither.
    """
    words = re.findall(r"[^\W\d_]+", answer.lower())
    if words and words[0] in ("yes", "no"):
        return words[0] == "yes"
    # Otherwise the answer is a sentence, such as "The answer is no."
    explicit = {"yes", "no"} & set(words)
    if len(explicit) != 1:
        return None
    return explicit == {"yes"}


find = by_pattern(*(f"pope/*_{split}.json" for split in SPLITS))

POPE = Suite(
    name="pope",
    measures="yes-or-no questions about objects that are or are not in an image",
    files=(
        *(f"pope/*_{split}.json: the {split} questions, JSON lines" for split in SPLITS),
        "COCO val2014's images, in the folder itself, images/ or val2014/",
    ),
    download="github.com/AoiDragon/POPE (output/coco); cocodataset.org (2014 Val images); "
    "a small version is written by `cafe scenes write DIR`",
    sources=("arXiv 2305.10355",),
    generation=("pope/mean/auc", "pope/mean/accuracy"),
    find_files=find,
    run=run,
    headline=("pope/adversarial/accuracy", "pope/mean/accuracy"),
    lower_is_better=("pope/*/neither",),
    no_direction=("pope/*/yes_ratio",),
    labels={"pope": "POPE", "pope/adversarial/accuracy": "POPE, adversarial", "pope/mean/accuracy": "POPE, mean"},
)
