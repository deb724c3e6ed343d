"""POPE's splits and their means, and the area under the ROC curve of the model's yes against scikit-learn's."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from cafe import Cafe
from cafe.content import Content, ImageRef
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.runner import write
from cafe.evaluation.suites import pope
from cafe.scenes import BASE

KINDS = ("dog", "cat", "cup", "car", "bus", "tie")
WORDS = ("yes", "Yes", "no", "No")


class Guesses:
    """Score each question at random, with ties, and answer what is more likely."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.scored = seed, []

    def likelihoods(self, prompt: Content) -> np.ndarray:
        random = np.random.default_rng([self.seed, *prompt.text.encode(), *str(prompt.images[0].source).encode()])
        return -random.integers(1, 4, size=4).astype(np.float32)

    def generate_batch(self, prompts, max_new_tokens=8, batch_size=64):
        return [WORDS[self.likelihoods(prompt).argmax()] for prompt in prompts]

    def score_batch(self, contents, answers, batch_size=16, with_end=True):
        assert not with_end and all(said == WORDS for said in answers)
        self.scored += [(str(content.images[0].source), content.text) for content in contents]
        return [self.likelihoods(content) for content in contents]

    def margin(self, prompt: Content) -> float:
        odds = np.exp(self.likelihoods(prompt).astype(float))
        return round(float(np.log(odds[:2].sum() / odds[2:].sum())), 4)


def records(start: int, labels: str = "yn") -> list[dict[str, Any]]:
    """Ask about each kind in each of four images."""
    rows = []
    for number in range(4):
        for index, kind in enumerate(KINDS[start:]):
            label = {"y": "yes", "n": "no"}[labels[(index + number) % len(labels)]]
            rows.append({"image": f"{number}.png", "text": f"Is there a {kind} in the image?", "label": label})
    return [{"question_id": number, **row} for number, row in enumerate(rows, 1)]


def write_split(data: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (data / "pope").mkdir(exist_ok=True)
    (data / "pope" / f"coco_pope_{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    return tmp_path


def run(data: Path, model: Any = None, limit: int | None = None):
    return pope.run(CachedModel(model or Guesses()), data, limit)


@pytest.mark.parametrize("seed", range(3))
def test_the_auc_and_the_yes_ratio_of_the_likelihoods_are_those_of_the_margins(data, seed):
    write_split(data, "popular", records(0))
    model = Guesses(seed)
    done = run(data, model)
    rows = done.outputs["pope/popular"]
    margins = [model.margin(Content((ImageRef(data / row["image"]), row["asked"]))) for row in rows]
    assert len(set(margins)) < len(margins)  # some are tied
    np.testing.assert_allclose([row["margin"] for row in rows], margins, atol=1e-9)
    labels = [row["label"] == "yes" for row in rows]
    for part in ("popular", "mean"):
        expected = 100 * roc_auc_score(labels, margins)
        assert done.results[f"pope/{part}/auc"] == pytest.approx(expected)
        ratio = 100 * np.mean(np.array(margins) > 0)
        assert done.results[f"pope/{part}/likelihood_yes_ratio"] == pytest.approx(ratio)


def test_a_question_of_several_splits_is_scored_once_and_its_margin_is_written(data, tmp_path):
    for start, split in enumerate(pope.OFFICIAL_SPLITS):
        write_split(data, split, records(start))
    model = Guesses()
    done = run(data, model)
    assert len(model.scored) == len(set(model.scored)) == 4 * len(KINDS)
    # Those about one image stand together.
    images = [image for image, _ in model.scored]
    assert sum(a != b for a, b in pairwise(images)) == 3
    write(done, tmp_path / "out")
    for start, split in enumerate(pope.OFFICIAL_SPLITS):
        rows = [json.loads(line) for line in (tmp_path / f"out/outputs/pope_{split}.jsonl").open()]
        assert [(row["id"], row["asked"], row["label"]) for row in rows] == [
            (row["question_id"], row["text"], row["label"]) for row in records(start)
        ]
        assert [row["margin"] for row in rows] == [row["margin"] for row in done.outputs[f"pope/{split}"]]


def test_other_splits_follow_the_official_ones_and_leave_the_mean_alone(data):
    for start, split in enumerate(("random", "adversarial", "popular")):
        write_split(data, split, records(start))
    official = run(data).results
    write_split(data, "subgroup", records(1))
    write_split(data, "animal", records(2))
    done = run(data)
    assert list(done.outputs) == [f"pope/{split}" for split in (*pope.OFFICIAL_SPLITS, "animal", "subgroup")]
    assert official.items() <= done.results.items() and "pope/subgroup/auc" in done.results
    for metric in ("accuracy", "F1", "auc", "likelihood_yes_ratio"):
        parts = [f"pope/{split}/{metric}" for split in pope.OFFICIAL_SPLITS]
        assert done.means[f"pope/mean/{metric}"] == parts
        assert done.results[f"pope/mean/{metric}"] == pytest.approx(np.mean([official[part] for part in parts]))


def test_the_mean_is_over_all_splits_where_none_is_official(data):
    for start, split in enumerate(("subgroup", "animal")):
        write_split(data, split, records(start))
    assert run(data).means["pope/mean/auc"] == ["pope/animal/auc", "pope/subgroup/auc"]


def test_a_split_with_one_label_has_no_auc(data):
    write_split(data, "random", records(0))
    write_split(data, "popular", records(0, "n"))
    done = run(data)
    assert "pope/popular/auc" not in done.results and "pope/popular/likelihood_yes_ratio" in done.results
    assert done.results["pope/mean/auc"] == done.results["pope/random/auc"]
    assert len(done.means["pope/mean/accuracy"]) == 2
    assert not any(name.endswith("/auc") for name in run(data, limit=1).results)


def test_files_without_questions_or_a_name_are_no_splits(data):
    write_split(data, "random", records(0))
    for name in ("coco_co_occur.json", "coco_ground_truth_objects.json", "coco_.json", "notes.json", "a_b.jsonl"):
        (data / "pope" / name).write_text("{}")
    assert [path.name for path in pope.find(data)] == ["coco_pope_random.json"]
    write_split(data, "[a]*", records(0))  # which is a pattern
    assert list(run(data).outputs) == ["pope/random", "pope/[a]*"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["coco_pope_mean"], "A split of POPE in .* is called mean"),
        (["a_own", "b_own"], r"pope/a_own.json and pope/b_own.json in .* measure the same"),
    ],
)
def test_names_that_do_not_tell_splits_apart_are_refused(data, names, said):
    (data / "pope").mkdir()
    for name in names:
        (data / "pope" / f"{name}.json").write_text(json.dumps(records(0)[0]))
    with pytest.raises(CafeError, match=said):
        pope.find(data)


def test_the_shipped_model_tells_what_is_there(scenes):
    model = Cafe.load(BASE)
    done = pope.run(CachedModel(model), scenes, 60)
    rows = done.outputs["pope/adversarial"]
    assert done.results["pope/mean/auc"] > 95
    labels, margins = [row["label"] == "yes" for row in rows], [row["margin"] for row in rows]
    assert done.results["pope/adversarial/auc"] == pytest.approx(100 * roc_auc_score(labels, margins))
    assert done.results["pope/adversarial/likelihood_yes_ratio"] == done.results["pope/adversarial/yes_ratio"]

    # This tokenizer has a token for each word in lower case, which the model says.
    yes, no = model.chat_processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    for row in rows[:6]:
        prompt = model.encode_prompt(Content((ImageRef(scenes / row["image"]), row["asked"])))
        with torch.inference_mode():
            logits = model.lvlm(**model.chat_processor.collate([prompt])).logits[0, -1].double()
        assert row["margin"] == pytest.approx(float(logits[yes] - logits[no]), abs=1e-3)
