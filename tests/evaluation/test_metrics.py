"""Metrics against brute force and scikit-learn."""

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

SHARED_POPE = Path(__file__).parents[2].parent / "shared" / "data" / "pope"


def test_recall_matches_sorting_by_hand():
    rng = np.random.default_rng(0)
    similarity = rng.normal(size=(30, 40))
    relevant = rng.random((30, 40)) < 0.05
    relevant[:, 0] = True
    for k, value in recall_at_k(similarity, relevant).items():
        hits = [relevant[q][np.argsort(-similarity[q])[:k]].any() for q in range(30)]
        assert value == pytest.approx(100 * np.mean(hits))


def test_ties_count_against_us():
    assert recall_at_k(np.zeros((3, 3)), np.eye(3, dtype=bool)) == {1: 0, 5: 100, 10: 100}


def test_binary_scores_match_scikit_learn():
    rng = np.random.default_rng(1)
    said, true = rng.random(50) < 0.6, rng.random(50) < 0.5
    scores = binary_scores(said.tolist(), true.tolist())
    for name, reference in (
        ("accuracy", accuracy_score),
        ("precision", precision_score),
        ("recall", recall_score),
        ("F1", f1_score),
    ):
        assert scores[name] == pytest.approx(100 * reference(true, said))
    assert binary_scores([False], [True])["F1"] == 0


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, there is.", True),
        ("No.", False),
        ("There is not, I think", False),
        ("I see. No dog", True),  # only what stands before the first full stop counts
        ("NO", True),  # and only these spellings
        ("Nothing", True),
        ("no,", False),
        ("", True),
    ],
)
def test_pope_answers_are_read_as_pope_does(answer, yes):
    assert parse_yes_no(answer) is yes


@pytest.mark.skipif(not SHARED_POPE.is_dir(), reason="the real POPE files are not here")
def test_the_real_pope_files_are_balanced():
    for file in SHARED_POPE.glob("*.json"):
        labels = [json.loads(line)["label"] == "yes" for line in file.read_text().splitlines()]
        assert len(labels) == 3000 and binary_scores(labels, labels)["yes_ratio"] == 50


def test_objects_are_whole_words():
    assert mentioned_objects("A someone saw one Cat, stonework.", {"one", "cat", "stone"}) == {"one", "cat"}
    scores = object_scores([{"cat", "dog"}, set()], [{"cat"}, {"bird"}])
    assert scores == {"precision": 50, "recall": 50, "hallucinated": 50}


def test_geometry_matches_brute_force():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 10, 4))
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    assert modality_gap(a, b) == pytest.approx(np.sqrt(((a.mean(0) - b.mean(0)) ** 2).sum()))
    assert alignment(a, b) == pytest.approx(np.mean([((x - y) ** 2).sum() for x, y in zip(a, b, strict=True)]))
    pairs = [np.exp(-2 * ((a[i] - a[j]) ** 2).sum()) for i in range(10) for j in range(i)]
    assert uniformity(a) == pytest.approx(np.log(np.mean(pairs)))
