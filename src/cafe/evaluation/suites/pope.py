"""POPE: yes-or-no questions about objects that are or are not in a picture (arXiv 2305.10355)."""

import re
from pathlib import Path
from typing import Any

from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate, ask_about_images, by_pattern, json_lines, mean_of

SPLITS = ("random", "popular", "adversarial")
MAX_NEW_TOKENS = 8  # tokens of an answer


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Asks the questions of each split that is there. What several splits ask is asked once."""
    done = EvaluationResult()
    splits = {path: read(path)[:limit] for path in find(data)}
    asked = {(row["image"], row["text"]): row for rows in splits.values() for row in rows}
    heard = dict(
        zip(
            asked,
            ask_about_images(model, data, next(iter(splits)), list(asked.values()), MAX_NEW_TOKENS, "val2014"),
            strict=True,
        )
    )
    for path, rows in splits.items():
        split = path.stem.rsplit("_", 1)[-1]
        outputs = []
        for number, row in enumerate(rows):
            begun, label = heard[row["image"], row["text"]], row["label"]
            counted = contributions(begun["said"], label == "yes", f"pope/{split}")
            outputs.append({**begun, "id": row.get("question_id", number), "label": label, "marks": counted})
        done.outputs[f"pope/{split}"] = outputs
        done.results |= aggregate(outputs)
    for name in ("accuracy", "precision", "recall", "F1", "yes_ratio", "strict_accuracy", "neither"):
        mean_of(done, f"pope/mean/{name}", [key for key in done.results if key.endswith(f"/{name}")])
    return done


def read(path: Path) -> list[dict[str, Any]]:
    """The questions of a split.

    Raises:
        CafeError: a record lacks a field, or its label is neither yes nor no.
    """
    rows = json_lines(path, {"image": str, "text": str, "label": str})
    for number, row in enumerate(rows, 1):
        if row["label"] not in ("yes", "no"):
            raise CafeError(f"The label in record {number} of {path} should be yes or no, not {row['label']!r}.")
    return rows


def contributions(answer: str, true: bool, part: str) -> dict[str, Any]:
    """What an answer counts for, read as POPE reads it; beside it, the strict reading's accuracy.

    F1 is 2 hits over the "yes" said and the "yes" due, so that it is a share of sums like the others.
    """
    yes, strict = parse_yes_no(answer), parse_strictly(answer)
    hit = int(yes and true)
    return {
        f"{part}/accuracy": int(yes == true),
        f"{part}/precision": [hit, int(yes)],
        f"{part}/recall": [hit, int(true)],
        f"{part}/F1": [2 * hit, int(yes) + int(true)],
        f"{part}/yes_ratio": int(yes),
        f"{part}/strict_accuracy": int(strict is not None and strict == true),
        f"{part}/neither": int(strict is None),
    }


def parse_yes_no(answer: str) -> bool:
    """POPE's own reading of an answer: "no" if its first sentence holds the word No, not or no, and "yes" otherwise."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def parse_strictly(answer: str) -> bool | None:
    """Whether an answer says yes (True) or no (False) in so many words; None where it says neither, or both.

    An answer that begins with either word, in upper or lower case, means it; in any other, exactly one of the two must
    stand. "There is not" says neither.
    """
    words = re.findall(r"[^\W\d_]+", answer.lower())
    if words and words[0] in ("yes", "no"):
        return words[0] == "yes"
    found = {word for word in words if word in ("yes", "no")}
    return found == {"yes"} if len(found) == 1 else None


find = by_pattern(*(f"pope/*_{split}.json" for split in SPLITS))

POPE = Suite(
    name="pope",
    measures="yes-or-no questions about objects that are or are not in a picture",
    files=(
        *(f"pope/*_{split}.json: the {split} probes, JSON lines" for split in SPLITS),
        "COCO val2014's pictures, in the folder itself, images/ or val2014/",
    ),
    download="github.com/AoiDragon/POPE (output/coco); cocodataset.org (2014 Val images); "
    "written small by `cafe scenes write DIR`",
    sources=("arXiv 2305.10355",),
    find_files=find,
    run=run,
)
