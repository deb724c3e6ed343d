"""The numbers agree with brute force, with scikit-learn and with POPE's own reading of answers."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from cafe.evaluation.metrics import (
    alignment,
    binary_scores,
    mentioned_objects,
    modality_gap,
    object_scores,
    parse_yes_no,
    recall_at_k,
    uniformity,
)

POPE = Path(__file__).parents[3] / "shared" / "data" / "pope"


def unit_rows(seed: int, count: int, dim: int = 8) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_recall_agrees_with_sorting_each_query(seed):
    random = np.random.default_rng(seed)
    similarity = random.normal(size=(30, 40))
    relevant = random.random((30, 40)) < 0.05
    relevant[np.arange(30), random.integers(40, size=30)] = True
    for k, value in recall_at_k(similarity, relevant, (1, 3, 10)).items():
        hits = [any(relevant[query][np.argsort(-similarity[query])[:k]]) for query in range(30)]
        assert value == pytest.approx(100 * np.mean(hits))


def test_recall_counts_ties_against_the_model():
    assert recall_at_k(np.zeros((3, 3)), np.eye(3, dtype=bool)) == {1: 0, 5: 100, 10: 100}
    right = np.eye(4, dtype=bool)
    assert recall_at_k(np.zeros((4, 4)), right, (1, 3, 4)) == {1: 0.0, 3: 0.0, 4: 100.0}
    tied = np.array([[1.0, 1.0, 0.0, 0.0]])
    assert recall_at_k(tied, right[:1], (1, 2)) == {1: 0.0, 2: 100.0}


def test_two_captions_of_one_image_do_not_tie_with_each_other():
    assert recall_at_k(np.array([[1.0, 1.0, 0.0]]), np.array([[True, True, False]]), (1,)) == {1: 100.0}


def test_a_model_that_gives_nan_finds_nothing():
    assert recall_at_k(np.full((3, 3), np.nan), np.eye(3, dtype=bool), (1,)) == {1: 0.0}


def test_a_query_without_a_match_finds_nothing():
    assert recall_at_k(np.ones((1, 3)), np.zeros((1, 3), bool), (1,)) == {1: 0.0}


def test_geometry_agrees_with_loops():
    images, texts = unit_rows(0, 20), unit_rows(1, 20)
    centre = [sum(rows) / 20 for rows in (images, texts)]
    assert modality_gap(images, texts) == pytest.approx(np.sqrt(((centre[0] - centre[1]) ** 2).sum()))
    squares = [((a - b) ** 2).sum() for a, b in zip(images, texts, strict=True)]
    assert alignment(images, texts) == pytest.approx(np.mean(squares))
    pairs = [np.exp(-2 * ((images[i] - images[j]) ** 2).sum()) for i in range(20) for j in range(i)]
    assert uniformity(images) == pytest.approx(np.log(np.mean(pairs)))


def test_uniformity_in_blocks_agrees_with_all_pairs_at_once():
    rows = unit_rows(2, 1500, 4)
    squared = 2 - 2 * (rows @ rows.T)[np.triu_indices(1500, 1)]
    assert uniformity(rows) == pytest.approx(np.log(np.exp(-2 * squared).mean()))


def test_geometry_at_its_ends():
    rows = unit_rows(0, 10)
    assert modality_gap(rows, rows) == 0
    assert alignment(rows, -rows) == pytest.approx(4)
    assert uniformity(np.repeat(rows[:1], 5, axis=0)) == pytest.approx(0)


@pytest.mark.parametrize("seed", range(4))
def test_binary_scores_agree_with_scikit_learn(seed):
    said, labels = (np.random.default_rng(seed).random((2, 50)) < 0.4).tolist()
    scores = binary_scores(said, labels)
    for name, reference in (
        ("accuracy", accuracy_score),
        ("precision", precision_score),
        ("recall", recall_score),
        ("F1", f1_score),
    ):
        assert scores[name] == pytest.approx(100 * reference(labels, said))
    assert scores["yes_ratio"] == pytest.approx(2 * sum(said))


def test_binary_scores_of_a_model_that_always_says_no():
    scores = binary_scores([False, False], [True, False])
    assert scores == {"accuracy": 50.0, "precision": 0.0, "recall": 0.0, "F1": 0.0, "yes_ratio": 0.0}


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("yes", True),
        ("Yes, there is a dog.", True),
        ("No", False),
        ("no", False),
        ("No, there is not.", False),
        ("no.", False),
        ("There is not a dog in the image.", False),
        ("Yes. No, I am not sure.", True),  # only the first sentence is read
        ("NO", True),  # the words are compared as they are written
        ("Not that I see", True),
        ("I know nothing of it", True),  # whole words only
        ("No!", True),  # only commas are removed
        ("No\nthere is none", True),  # split at single spaces only
        ("well,no", True),  # the comma is removed, not replaced: "wellno"
        ("I see. No dog", True),
        ("Nothing", True),
        ("no,", False),
        ("", True),
        (". no", True),
    ],
)
def test_answers_are_read_as_pope_reads_them(answer, yes):
    assert parse_yes_no(answer) is yes


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_a_perfect_answer_to_the_real_pope_files_scores_100(split):
    file = POPE / f"coco_pope_{split}.json"
    if not file.is_file():
        pytest.skip("The POPE files are not beside this checkout.")
    labels = [json.loads(line)["label"] for line in file.read_text().splitlines()]
    assert len(labels) == 3000
    assert labels.count("yes") == labels.count("no") == 1500
    truth = [label == "yes" for label in labels]
    assert binary_scores([parse_yes_no(label) for label in labels], truth) == {
        "accuracy": 100.0,
        "precision": 100.0,
        "recall": 100.0,
        "F1": 100.0,
        "yes_ratio": 50.0,
    }


def test_objects_are_found_as_whole_words():
    vocabulary = {"one", "ring", "star", "dining table"}
    assert mentioned_objects("A bone and a string.", vocabulary) == set()
    assert mentioned_objects("One star, on the dining table!", vocabulary) == {"one", "star", "dining table"}
    assert mentioned_objects("A someone saw one Cat, stonework.", {"one", "cat", "stone"}) == {"one", "cat"}
    assert mentioned_objects("a dining room and a table", vocabulary) == set()


def test_object_scores_count_over_all_texts():
    scores = object_scores([{"a", "b"}, {"c"}, set()], [{"a"}, {"c", "d"}, {"e"}])
    assert scores == pytest.approx({"precision": 200 / 3, "recall": 50, "hallucinated": 100 / 3})
    scores = object_scores([{"cat", "dog"}, set()], [{"cat"}, {"bird"}])
    assert scores == {"precision": 50, "recall": 50, "hallucinated": 50}
    assert object_scores([set()], [set()]) == {"precision": 0, "recall": 0, "hallucinated": 0}
