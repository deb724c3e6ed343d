"""POPE: yes-or-no questions about objects that are or are not in an image (arXiv 2305.10355).

Each question is asked twice: the answer is generated and parsed, and "yes" and "no" are scored as its first words. The
margin, log P(yes) - log P(no), ranks the questions; the area under its ROC curve does not depend on how readily a model
says yes, as the accuracy does.
"""

import re
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from cafe.content import Content, ImageRef
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.io import ask_about_images, find_one, json_lines
from cafe.evaluation.metrics import roc_auc
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate

OFFICIAL_SPLITS = ("random", "popular", "adversarial")
# Files that the authors keep beside the questions, and which hold none.
NO_QUESTIONS = ("*_co_occur.json", "*_ground_truth_objects.json")
MAX_NEW_TOKENS = 8
# Models begin their answers with either. The probabilities of both are added.
YES, NO = ("yes", "Yes"), ("no", "No")
DECIMALS = 4  # of a margin: equal ones may differ by less in float32, and should tie

Question = tuple[str, str]  # the name of its image, and its text


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Ask the questions of each split that is there. A question that several splits share is asked once."""
    result = EvaluationResult()
    splits = {path: read(path)[:limit] for path in find(data)}
    answers = _ask(model, data, splits)
    for path, records in splits.items():
        part = f"pope/{split_name(path)}"
        rows = []
        for number, record in enumerate(records):
            row, label = answers[record["image"], record["text"]], record["label"]
            marks = contributions(row["said"], label == "yes", part)
            marks[f"{part}/likelihood_yes_ratio"] = int(row["margin"] > 0)
            # The id is that of this split, whichever split the question was asked for.
            rows.append({**row, "id": record.get("question_id", number), "label": label, "marks": marks})
        result.outputs[part] = rows
        result.results |= aggregate(rows) | separation(rows, part)
    _add_means(result)
    return result


def _ask(model: CachedModel, data: Path, splits: dict[Path, list[dict[str, Any]]]) -> dict[Question, dict[str, Any]]:
    """Ask the questions of all splits.

    Args:
        model: the model.
        data: the folder of evaluation files.
        splits: by file, its questions.

    Returns:
        by question, its output row.
    """
    # The splits share half of their questions: those about objects that are present.
    unique = {(record["image"], record["text"]): record for records in splits.values() for record in records}
    # Questions about one image stand together, so that it is read once for several of them.
    questions = dict(sorted(unique.items(), key=lambda item: item[0]))
    source = next(iter(splits))  # for errors; images are in the same place for all splits
    answered = ask_about_images(model, data, source, list(questions.values()), MAX_NEW_TOKENS, "val2014")
    margins = yes_margins(model, [Content((ImageRef(data / row["image"]), row["asked"])) for row in answered])
    rows = [{**row, "margin": margin} for row, margin in zip(answered, margins, strict=True)]
    return dict(zip(questions, rows, strict=True))


def yes_margins(model: CachedModel, prompts: Sequence[Content]) -> list[float]:
    """Compute log P(yes) - log P(no) of each question, in nats: of the answers that begin with either word.

    A word counts in lower case and capitalized, whichever the model prefers. The end of the answer does not count: for
    a model that says "Yes, there is.", it would measure how rarely the model stops after one word.
    """
    scores = np.array(model.score(prompts, [(*YES, *NO)] * len(prompts), with_end=False), np.float64)
    # A row per question, also where there are none.
    yes, no = np.hsplit(scores.reshape(-1, len(YES) + len(NO)), [len(YES)])
    margins = np.logaddexp.reduce(yes, axis=1) - np.logaddexp.reduce(no, axis=1)
    rounded: list[float] = np.round(margins, DECIMALS).tolist()
    return rounded


def separation(rows: Sequence[dict[str, Any]], part: str) -> dict[str, float]:
    """Compute how well the margins tell present objects from absent ones; nothing if all labels are the same.

    Args:
        rows: the output rows of a split.
        part: begins the name of the result.
    """
    margins = np.array([row["margin"] for row in rows])
    is_present = np.array([row["label"] == "yes" for row in rows])
    if is_present.all() or not is_present.any():
        return {}
    return {f"{part}/auc": roc_auc(margins, is_present)}


def _add_means(result: EvaluationResult) -> None:
    """Add the means over the official splits; over all splits, if none is official."""
    official = [f"pope/{split}" for split in OFFICIAL_SPLITS]
    # A mean that is published is over these, whatever else is measured beside them.
    parts = [part for part in result.outputs if part in official] or list(result.outputs)
    by_metric: dict[str, list[str]] = {}
    for name in result.results:
        part, _, metric = name.rpartition("/")
        if part in parts:
            by_metric.setdefault(metric, []).append(name)
    for metric, names in by_metric.items():
        result.add_mean(f"pope/mean/{metric}", names)


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


def find(data: Path) -> list[Path]:
    """Find the files of the splits: the official ones first, others in the order of their names.

    Raises:
        CafeError: two files are of one split, or a split has the name of the mean.
    """
    ignored = {path.name for pattern in NO_QUESTIONS for path in data.glob(f"pope/{pattern}")}
    names = {split_name(path) for path in data.glob("pope/*_?*.json") if path.name not in ignored} - {""}
    if "mean" in names:
        raise CafeError(f"A split of POPE in {data / 'pope'} is called mean, as the mean over splits: rename its file.")
    others = sorted(names.difference(OFFICIAL_SPLITS))
    files: list[Path] = []
    for name in (*OFFICIAL_SPLITS, *others):
        files += find_one(data, f"pope/*_{escape(name)}.json", exclude=sorted(ignored))
    return files


def split_name(path: Path) -> str:
    """Return the name of a file's split: what follows the last underscore."""
    return path.stem.rpartition("_")[2]


POPE = Suite(
    name="pope",
    measures="yes-or-no questions about objects that are or are not in an image",
    files=(
        *(f"pope/*_{split}.json: the {split} questions, JSON lines" for split in OFFICIAL_SPLITS),
        "pope/*_NAME.json: questions about absent objects of your own choice (optional)",
        "COCO val2014's images, in the folder itself, images/ or val2014/",
    ),
    download="github.com/AoiDragon/POPE (output/coco); cocodataset.org (2014 Val images); "
    "a small version is written by `cafe scenes write DIR`",
    sources=("arXiv 2305.10355",),
    generation=("pope/mean/auc", "pope/mean/accuracy"),
    find_files=find,
    run=run,
    headline=("pope/adversarial/accuracy", "pope/mean/accuracy", "pope/mean/auc"),
    lower_is_better=("pope/*/neither",),
    no_direction=("pope/*/yes_ratio", "pope/*/likelihood_yes_ratio"),
    labels={
        "pope": "POPE",
        "pope/adversarial/accuracy": "POPE, adversarial",
        "pope/mean/accuracy": "POPE, mean",
        "pope/mean/auc": "POPE, AUC",
    },
)
