"""VQA's soft accuracy: an answer is as right as people agree with it (arXiv 1505.00468; VQA v2, arXiv 1612.00837).

Each question has answers by ten people. Against nine of them at a time, an answer's accuracy is min(matches / 3, 1);
the mean over the ten ways to leave one out is its score: 0, 0.3, 0.6, 0.9 and 1 for none, one, two, three and more.
Answers are compared after the official normalization: lower case, no punctuation, no articles, number words as digits,
apostrophes restored; `vqav2_normalization.json` has its words. (The official code leaves answers as they are if all
ten people agree; here they are always normalized, as in EvalAI's evaluation.)

OK-VQA (arXiv 1906.00067) comes in files of the same form, whose annotations have each answer twice: as it was given
(`raw_answer`) and by its stem (`answer`, "surf" for "surfing"). Answers are compared with the raw ones, without a
stemmer, as lmms-eval's task `ok_vqa` compares whole words; OpenFlamingo instead stems what the model says.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.io import ask_about_images, json_lines, load_json, require_fields
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate

MAX_NEW_TOKENS = 16
SHORT_ANSWER_PROMPT = "\nAnswer the question using a single word or phrase."  # as in LLaVA (arXiv 2310.03744)
QUESTIONS_SUFFIX, ANNOTATIONS_SUFFIX = "_questions.json", "_annotations.json"

_TABLE = json.loads(files("cafe.evaluation.suites").joinpath("vqav2_normalization.json").read_text(encoding="utf-8"))
NUMBERS: dict[str, str] = _TABLE["numbers"]
ARTICLES: list[str] = _TABLE["articles"]
PUNCTUATION: str = _TABLE["punctuation"]
CONTRACTIONS: dict[str, str] = {word.replace("'", ""): word for word in _TABLE["contractions"]}


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Ask the first `limit` questions of each file that is there."""
    result = EvaluationResult()
    for path in find(data):
        name = path.name.removesuffix(QUESTIONS_SUFFIX).removesuffix(".jsonl")
        part = f"vqav2/{name}"
        rows = _answer(model, data, path, part, limit)
        result.outputs[part] = rows
        result.results |= aggregate(rows)
    return result


def _answer(model: CachedModel, data: Path, path: Path, part: str, limit: int | None) -> list[dict[str, Any]]:
    """Ask and score the questions of one file.

    Args:
        model: the model.
        data: the folder of evaluation files.
        path: the file of questions.
        part: begins the names of the results.
        limit: the number of questions; all of them if None.
    """
    records = read(path)[:limit]
    # The request for a short answer is appended for the model alone; the output rows show the question.
    prompts = [{**record, "text": record["text"] + record.get("prompt", SHORT_ANSWER_PROMPT)} for record in records]
    answered = ask_about_images(model, data, path, prompts, MAX_NEW_TOKENS, "val2014")
    rows = []
    for record, row in zip(records, answered, strict=True):
        score = accuracy(row["said"], record["answers"])
        marks = {f"{part}/all": score}
        if record.get("kind"):
            marks[f"{part}/{record['kind'].replace('/', '_')}"] = score  # "yes/no" would be two parts of a key
        rows.append({**row, "asked": record["text"], "answers": record["answers"], "marks": marks})
    return rows


def accuracy(answer: str, answers: Sequence[str]) -> float:
    """Compute how far people agree with an answer, from 0 to 1.

    Args:
        answer: the model's.
        answers: people's, ten of them in VQA.
    """
    normalized = normalize(answer)
    matches = [normalize(other) == normalized for other in answers]
    if len(matches) == 1:  # a single reference: right or wrong
        return float(matches[0])
    # Each person is left out in turn.
    without_one = [min(1.0, (sum(matches) - match) / 3) for match in matches]
    return sum(without_one) / len(matches)


def normalize(answer: str) -> str:
    """Normalize an answer as the official evaluation does before it compares.

    The steps, their order and their odd cases are those of its script.
    """
    text = " ".join(answer.split())
    cleaned = _remove_punctuation(text)
    # In the official order: number words, then articles, then contractions.
    words = [NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _remove_punctuation(text: str) -> str:
    """Remove punctuation marks, or replace them by spaces where they separate words."""
    # "1,000" becomes "1000"; and in such an answer, all marks are removed.
    has_number_with_comma = re.search(r"\d,+\d", text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        # Looked up in the original text, for all places where the mark stands.
        next_to_space = f"{mark} " in text or f" {mark}" in text
        is_removed = next_to_space or has_number_with_comma
        cleaned = cleaned.replace(mark, "" if is_removed else " ")
    return re.sub(r"\.(?!\d)", "", cleaned)  # a decimal point stays


def read(path: Path) -> list[dict[str, Any]]:
    """Read the questions of JSON lines, or of VQA's own pair of files.

    Raises:
        CafeError: a file does not have its format, or the annotations are not beside the questions.
    """
    if path.suffix == ".jsonl":
        return _read_json_lines(path)
    return _read_vqa_files(path)


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read records whose answers are texts, or objects with a text as in VQA's annotations."""
    return _check_answers(path, json_lines(path, {"image": str, "text": str, "answers": list}))


def _check_answers(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take the answers of each record by their texts; raise if there are none."""
    for number, row in enumerate(rows, 1):
        answers = list(map(_answer_text, row["answers"]))
        row["answers"] = answers
        # Without a text to compare with, no answer could be right.
        if not answers or None in answers:
            raise CafeError(f"Record {number} of the evaluation file {path} has no answers, or one that is not text.")
        # What is optional is text if it is there.
        for name in ("prompt", "kind"):
            if not isinstance(row.get(name, ""), str):
                raise CafeError(f"The field {name!r} in record {number} of the evaluation file {path} is not text.")
    return rows


def _answer_text(answer: Any) -> str | None:
    """Get the text of an answer, of OK-VQA's the one that is no stem; None if it has none."""
    if isinstance(answer, dict):
        answer = answer.get("raw_answer", answer.get("answer"))
    return answer if isinstance(answer, str) else None


def _read_vqa_files(path: Path) -> list[dict[str, Any]]:
    """Read VQA's file of questions and the file of annotations beside it.

    `info.prompt`, which VQA's files do not have, replaces the request for a short answer; the scenes' file has it.
    """
    annotations = _annotations_beside(path)
    parsed, given = load_json(path), load_json(annotations)
    try:
        # The two files need not have their rows in the same order.
        by_question = {row["question_id"]: row for row in given["annotations"]}
        split = parsed.get("data_subtype", "val2014")
        prompt = (parsed.get("info") or {}).get("prompt", SHORT_ANSWER_PROMPT)
        rows = [_to_record(row, by_question[row["question_id"]], split, prompt) for row in parsed["questions"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CafeError(f"{path} and {annotations.name} are not VQA's files: {error!r}.") from None
    return _check_answers(path, require_fields(path, rows, {"text": str, "answers": list}))


def _annotations_beside(path: Path) -> Path:
    """Find the file of annotations that belongs to a file of questions.

    Raises:
        CafeError: it is not there.
    """
    name = path.name.removesuffix(QUESTIONS_SUFFIX) + ANNOTATIONS_SUFFIX
    # VQA v2 and OK-VQA have this word in the names of their questions alone.
    candidates = [path.with_name(name.replace("OpenEnded_", "")), path.with_name(name)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CafeError(f"The evaluation file {path} has no {candidates[0].name} beside it.")


def _to_record(question: Mapping[str, Any], annotation: Mapping[str, Any], split: str, prompt: str) -> dict[str, Any]:
    """Join a question and its annotation.

    Args:
        question: has the image's id and the text.
        annotation: has people's answers and the type of the answer.
        split: of COCO; with the id it makes the name of the image's file.
        prompt: the request for a short answer.
    """
    return {
        "question_id": question["question_id"],
        "image": f"COCO_{split}_{question['image_id']:012}.jpg",
        "text": question["question"],
        "prompt": prompt,
        "answers": annotation["answers"],
        "kind": annotation.get("answer_type", ""),
    }


def find(data: Path) -> list[Path]:
    """Find the files of questions: any in `vqa`, and those that have VQA's own names in the folder itself.

    Raises:
        CafeError: two have the same name.
    """
    paths = [*data.glob("vqa/*.jsonl"), *data.glob(f"vqa/*{QUESTIONS_SUFFIX}")]
    paths += data.glob(f"*OpenEnded_*{QUESTIONS_SUFFIX}")
    by_name: dict[str, Path] = {}
    for path in sorted(paths):
        if by_name.setdefault(path.name, path) != path:
            raise CafeError(f"{path} and {by_name[path.name]} measure the same: keep only one of them in the folder.")
    return list(by_name.values())


VQAV2 = Suite(
    name="vqav2",
    measures="short answers, each as right as ten people agree with it",
    files=(
        "vqa/*_questions.json and vqa/*_annotations.json: VQA's own files, as of VQA v2 and OK-VQA, by their own names",
        "or vqa/NAME.jsonl: image, text (the question), answers (ten of them)",
        "the images, in the folder itself, images/ or val2014/",
    ),
    download="visualqa.org (questions and annotations); okvqa.allenai.org; cocodataset.org (2014 Val images); "
    "a small version is written by `cafe scenes write DIR`",
    sources=("arXiv 1505.00468", "arXiv 1612.00837", "arXiv 1906.00067 (OK-VQA)"),
    find_files=find,
    run=run,
    default=False,
    headline=("vqav2/*/all",),
    generation=("vqav2/*/all",),
)
