"""VQA's soft accuracy: an answer is as right as people agree with it (arXiv 1505.00468; VQA v2, arXiv 1612.00837).

Each question has answers of ten people. Against nine of them at a time, an answer's accuracy is min(matches / 3, 1);
the mean over the ten ways to leave one out is its score: 0, 0.3, 0.6, 0.9 and 1 for none, one, two, three and more.
Answers are compared after the official normalisation: lower case, no punctuation, no articles, number words as digits,
apostrophes restored. (The official code leaves answers as they are where all ten people agree; here they are always
normalised, as EvalAI's evaluation does.)
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate, ask_about_images, json_lines

MAX_NEW_TOKENS = 16  # tokens of an answer
SHORTLY = "\nAnswer the question using a single word or phrase."  # LLaVA's words (arXiv 2310.03744)
ENDS = ("_questions.json", "_annotations.json")

NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
APOSTROPHES = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'm i've
isn't it'd it'll ma'am might've mightn't must've mustn't needn't o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've
who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in APOSTROPHES.split()}


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Asks the first `limit` questions of each file that is there."""
    done = EvaluationResult()
    for path in find(data):
        name = path.name.removesuffix(ENDS[0]).removesuffix(".jsonl")
        records = read(path)[:limit]
        asked = [{**record, "text": record["text"] + record.get("prompt", SHORTLY)} for record in records]
        rows = []
        for record, begun in zip(
            records, ask_about_images(model, data, path, asked, MAX_NEW_TOKENS, "val2014"), strict=True
        ):
            score = accuracy(begun["said"], record["answers"])
            kinds = ["all", *([record["kind"].replace("/", "_")] if record.get("kind") else [])]
            marks = {f"vqav2/{name}/{kind}": score for kind in kinds}
            rows.append({**begun, "asked": record["text"], "answers": record["answers"], "marks": marks})
        done.outputs[f"vqav2/{name}"] = rows
        done.results |= aggregate(rows)
    return done


def accuracy(answer: str, answers: Sequence[str]) -> float:
    """How far people agree with an answer, from 0 to 1."""
    said = normalize(answer)
    matches = [normalize(other) == said for other in answers]
    if len(matches) == 1:  # a single reference: right or wrong
        return float(matches[0])
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def normalize(answer: str) -> str:
    """An answer as the official evaluation compares it."""
    text = " ".join(answer.split())
    # A mark beside a space, or in an answer with a comma inside a number, goes; between letters it becomes a space.
    comma = re.search(r"\d,+\d", text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside or comma else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = [NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def read(path: Path) -> list[dict[str, Any]]:
    """The questions of JSON lines, or of VQA's own pair of files.

    Raises:
        CafeError: a file is not of its format, or the annotations are not beside the questions.
    """
    if path.suffix == ".jsonl":
        rows = json_lines(path, {"image": str, "text": str, "answers": list})
        answers = [[a.get("answer") if isinstance(a, dict) else a for a in row["answers"]] for row in rows]
        for number, some in enumerate(answers, 1):
            if not some or not all(isinstance(answer, str) for answer in some):
                raise CafeError(
                    f"The evaluation file {path} has no answers in record {number}, or one that is no text."
                )
        return [{**row, "answers": some} for row, some in zip(rows, answers, strict=True)]
    beside = path.with_name(path.name.removesuffix(ENDS[0]) + ENDS[1])
    if "_OpenEnded_" in path.name:  # VQA v2 names its files in two ways
        beside = path.with_name(beside.name.replace("_OpenEnded", ""))
    try:
        asked = json.loads(path.read_text())
        split = asked.get("data_subtype", "val2014")
        prompt = (asked.get("info") or {}).get("prompt", SHORTLY)
        given = {row["question_id"]: row for row in json.loads(beside.read_text())["annotations"]}
        if not asked["questions"]:
            raise CafeError(f"The evaluation file {path} is empty.")
        return [
            {
                "question_id": row["question_id"],
                "image": f"COCO_{split}_{row['image_id']:012}.jpg",
                "text": row["question"],
                "prompt": prompt,
                "answers": [answer["answer"] for answer in given[row["question_id"]]["answers"]],
                "kind": given[row["question_id"]].get("answer_type", ""),
            }
            for row in asked["questions"]
        ]
    except FileNotFoundError:
        raise CafeError(f"The evaluation file {path} has no {beside.name} beside it.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CafeError(f"{path} and {beside.name} are not VQA's files: {error!r}.") from None


def find(data: Path) -> list[Path]:
    """The files of questions."""
    return sorted([*data.glob("vqa/*.jsonl"), *data.glob(f"vqa/*{ENDS[0]}")])


VQAV2 = Suite(
    name="vqav2",
    measures="short answers, each as right as ten people agree with it",
    files=(
        "vqa/*_questions.json and vqa/*_annotations.json: VQA's own, as VQA v2 and OK-VQA have them",
        "or vqa/NAME.jsonl: image, text (the question), answers (ten of them)",
        "the pictures, in the folder itself, images/ or val2014/",
    ),
    download="visualqa.org (questions and annotations); okvqa.allenai.org; cocodataset.org (2014 Val images); "
    "written small by `cafe scenes write DIR`",
    sources=("arXiv 1505.00468", "arXiv 1612.00837"),
    find_files=find,
    run=run,
    default=False,
)
