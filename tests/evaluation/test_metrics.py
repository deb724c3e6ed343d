"""The numbers agree with brute force, scikit-learn, SciPy, pytrec_eval and POPE's own reading of answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as strings
from scipy import stats
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import accuracy_score, f1_score, ndcg_score, precision_score, recall_score
from sklearn.neighbors import NearestNeighbors

from cafe.evaluation.metrics import (
    alignment,
    effective_rank,
    hubness,
    mentioned_objects,
    modality_gap,
    ndcg_at_k,
    rank_of_match,
    ranks,
    roc_auc,
    separability,
    similarities,
    uniformity,
)
from cafe.evaluation.suite import aggregate
from cafe.evaluation.suites import pope

POPE = Path(__file__).parents[3] / "shared" / "data" / "pope"


def unit_rows(seed: int, count: int, dim: int = 8) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_a_rank_agrees_with_sorting_each_query(seed):
    random = np.random.default_rng(seed)
    similarity = random.normal(size=(30, 40))
    relevant = random.random((30, 40)) < 0.05
    relevant[np.arange(30), random.integers(40, size=30)] = True
    rank = rank_of_match(similarity, relevant)
    for k in (1, 3, 10):
        hits = [any(relevant[query][np.argsort(-similarity[query])[:k]]) for query in range(30)]
        assert (rank < k).tolist() == hits


def test_ties_count_against_the_model():
    assert rank_of_match(np.zeros((3, 3)), np.eye(3, dtype=bool)).tolist() == [2, 2, 2]
    assert rank_of_match(np.array([[1.0, 1.0, 0.0, 0.0]]), np.eye(4, dtype=bool)[:1]).tolist() == [1]


def test_two_captions_of_one_image_do_not_tie_with_each_other():
    assert rank_of_match(np.array([[1.0, 1.0, 0.0]]), np.array([[True, True, False]])).tolist() == [0]


def test_a_model_that_gives_nan_finds_nothing():
    assert rank_of_match(np.full((3, 3), np.nan), np.eye(3, dtype=bool)).tolist() == [2, 2, 2]


def test_a_query_without_a_match_finds_nothing():
    assert rank_of_match(np.ones((1, 3)), np.zeros((1, 3), bool)).tolist() == [3]


def test_a_collapsed_model_finds_nothing_despite_rounding():
    row = unit_rows(0, 1, 160).astype(np.float32)
    images, texts = np.repeat(row, 1500, axis=0), np.repeat(row, 3001, axis=0)
    assert (ranks(images, texts, np.arange(1500), np.arange(3001) // 2) >= 2999).all()


def test_geometry_agrees_with_loops():
    images, texts = unit_rows(0, 20), unit_rows(1, 20)
    center = [sum(rows) / 20 for rows in (images, texts)]
    assert modality_gap(images, texts) == pytest.approx(np.sqrt(((center[0] - center[1]) ** 2).sum()))
    squares = [((a - b) ** 2).sum() for a, b in zip(images, texts, strict=True)]
    assert alignment(images, texts) == pytest.approx(np.mean(squares))
    pairs = [np.exp(-2 * ((images[i] - images[j]) ** 2).sum()) for i in range(20) for j in range(i)]
    assert uniformity(images) == pytest.approx(np.log(np.mean(pairs)))


def test_uniformity_in_blocks_agrees_with_all_pairs_at_once():
    rows = unit_rows(2, 1500, 4)
    squared = 2 - 2 * (rows @ rows.T)[np.triu_indices(1500, 1)]
    assert uniformity(rows) == pytest.approx(np.log(np.exp(-2 * squared).mean()))


def by_normal_equations(images: np.ndarray, texts: np.ndarray) -> list[bool]:
    """Which held-out rows ridge regression on the signs of the sides tells right, solved in closed form."""
    right = []
    for fold in (0, 1):
        fitted = np.concatenate([images[fold::2], texts[fold::2]])
        signs = np.repeat([1.0, -1.0], len(fitted) // 2)
        centered = fitted - fitted.mean(axis=0)
        weights = np.linalg.solve(centered.T @ centered + 1e-2 * np.eye(fitted.shape[1]), centered.T @ signs)
        held_out = np.concatenate([images[1 - fold :: 2], texts[1 - fold :: 2]])
        right += (((held_out - fitted.mean(axis=0)) @ weights > 0) == (signs > 0)).tolist()
    return right


@pytest.mark.parametrize("apart", [0.0, 0.05, 1.0])
def test_separability_agrees_with_scikit_learns_ridge(apart):
    images, texts = unit_rows(0, 60) + apart, unit_rows(1, 60)
    labels = np.repeat([1, 0], 30)
    right = []
    for fold in (0, 1):
        fitted = np.concatenate([images[fold::2], texts[fold::2]])
        tried = np.concatenate([images[1 - fold :: 2], texts[1 - fold :: 2]])
        right.append(RidgeClassifier(alpha=1e-2).fit(fitted, labels).score(tried, labels))
    assert separability(images, texts) == pytest.approx(100 * np.mean(right))
    assert separability(images, texts) == pytest.approx(100 * np.mean(by_normal_equations(images, texts)))
    assert separability(images, texts[:41]) > 0  # unequal sides are evened


def test_effective_rank_agrees_with_singular_values():
    for rows in (unit_rows(0, 50, 8), unit_rows(1, 6, 20)):
        shares = np.linalg.svd(rows, compute_uv=False)
        shares = shares / shares.sum()
        assert effective_rank(rows) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert effective_rank(np.eye(8)) == pytest.approx(8)
    assert effective_rank(np.ones((9, 4))) == pytest.approx(1, abs=1e-5)


def test_hubness_agrees_with_scikit_learns_neighbors_and_scipys_skewness():
    queries, candidates = unit_rows(0, 1500, 16), unit_rows(1, 300, 16)
    nearest = NearestNeighbors(n_neighbors=10).fit(candidates).kneighbors(queries, return_distance=False)
    counts = np.bincount(nearest.ravel(), minlength=300)
    deviation = counts - counts.mean()
    assert hubness(queries, candidates) == pytest.approx(stats.skew(counts))
    assert hubness(queries, candidates) == pytest.approx((deviation**3).mean() / (deviation**2).mean() ** 1.5)
    assert hubness(np.eye(12), np.eye(12), k=1) == 0  # all are found once


def test_similarities_in_blocks_agree_with_all_pairs_at_once():
    images, texts = unit_rows(0, 1100), unit_rows(1, 2200)
    owner, bins = np.arange(2200) // 2, np.linspace(-1, 1, 9)
    matched, mismatched, matches, mismatches = similarities(images, texts, owner, bins)
    every = images @ texts.T
    relevant = np.arange(1100)[:, None] == owner
    assert matched == pytest.approx(every[relevant].mean())
    assert mismatched == pytest.approx(every[~relevant].mean())
    assert matches.tolist() == np.histogram(every[relevant], bins)[0].tolist()
    assert mismatches.tolist() == np.histogram(every[~relevant], bins)[0].tolist()


def test_ranks_in_blocks_agree_with_all_pairs_at_once():
    queries, candidates = unit_rows(0, 1100), unit_rows(1, 330)
    groups, others = np.arange(1100) % 110, np.arange(330) // 3
    whole = rank_of_match(queries @ candidates.T, groups[:, None] == others)
    assert ranks(queries, candidates, groups, others).tolist() == whole.tolist()


def test_geometry_of_equal_opposite_and_collapsed_rows():
    rows = unit_rows(0, 10)
    assert modality_gap(rows, rows) == 0
    assert alignment(rows, -rows) == pytest.approx(4)
    assert uniformity(np.repeat(rows[:1], 5, axis=0)) == pytest.approx(0)
    assert separability(rows[:1], rows) == 50  # nothing to fit
    assert separability(np.full((4, 2), np.nan), rows[:, :2]) == 50  # nothing to tell apart


@pytest.mark.parametrize("seed", range(4))
def test_ndcg_agrees_with_scikit_learn_and_with_pytrec_eval(seed):
    random = np.random.default_rng(seed)
    similarity = random.permutation(600).reshape(20, 30) / 100.0  # no ties
    gains = random.integers(0, 4, (20, 30)) * (random.random((20, 30)) < 0.2)
    gains[:, 0] += 1
    judged = {str(q): {str(c): int(gains[q, c]) for c in range(30)} for q in range(20)}
    ranked = {str(q): {str(c): float(similarity[q, c]) for c in range(30)} for q in range(20)}
    trec = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.1,5,10"}).evaluate(ranked)
    for k in (1, 5, 10, 30):
        found = ndcg_at_k(similarity, gains.astype(float), k)
        each = [ndcg_score(gains[q : q + 1], similarity[q : q + 1], k=k) for q in range(20)]
        np.testing.assert_allclose(found, each, atol=1e-12)
        if k < 30:
            np.testing.assert_allclose(found, [trec[str(q)][f"ndcg_cut_{k}"] for q in range(20)], atol=1e-12)


def test_ndcg_counts_ties_and_missing_scores_against_the_model():
    gains = np.array([[1.0, 0.0, 0.0]])
    assert ndcg_at_k(np.zeros((1, 3)), gains, 2) == 0
    assert ndcg_at_k(np.zeros((1, 3)), gains, 3) == pytest.approx(1 / np.log2(4))
    assert ndcg_at_k(np.array([[np.nan, 1.0, 0.5]]), gains, 3) == pytest.approx(0.5)
    assert ndcg_at_k(np.array([[1.0, np.nan, np.nan]]), gains, 2) == 0
    assert ndcg_at_k(np.ones((1, 3)), np.zeros((1, 3)), 3) == 0


@pytest.mark.parametrize("seed", range(4))
def test_the_area_under_the_roc_curve_counts_pairs_in_order_and_half_of_the_ties(seed):
    random = np.random.default_rng(seed)
    scores, labels = random.integers(6, size=40).astype(float), random.random(40) < 0.4
    pairs = [
        (scores[a] > scores[b]) + (scores[a] == scores[b]) / 2
        for a in labels.nonzero()[0]
        for b in (~labels).nonzero()[0]
    ]
    assert roc_auc(scores, labels) == pytest.approx(100 * np.mean(pairs))
    assert roc_auc(-scores, labels) == pytest.approx(100 - roc_auc(scores, labels))
    assert roc_auc(np.zeros(40), labels) == 50


def test_the_area_under_the_roc_curve_needs_both_labels_and_finite_scores():
    both = np.array([True, False])
    assert all(np.isnan(roc_auc(np.arange(2.0), labels)) for labels in (both | True, both & False))
    assert np.isnan(roc_auc(np.array([np.nan, 1]), both)) and np.isnan(roc_auc(np.array([np.inf, 1]), both))


def pope_scores(said: list[str], labels: list[bool]) -> dict[str, float]:
    rows = [{"marks": pope.contributions(answer, label, "pope")} for answer, label in zip(said, labels, strict=True)]
    return {name.removeprefix("pope/"): value for name, value in aggregate(rows).items()}


@pytest.mark.parametrize("seed", range(4))
def test_pope_scores_agree_with_scikit_learn(seed):
    said, labels = (np.random.default_rng(seed).random((2, 50)) < 0.4).tolist()
    scores = pope_scores(["Yes." if yes else "No." for yes in said], labels)
    for name, reference in (
        ("accuracy", accuracy_score),
        ("precision", precision_score),
        ("recall", recall_score),
        ("F1", f1_score),
    ):
        assert scores[name] == pytest.approx(100 * reference(labels, said))
    assert scores["yes_ratio"] == pytest.approx(2 * sum(said))
    assert scores["strict_accuracy"] == scores["accuracy"] and scores["neither"] == 0


def test_pope_scores_of_a_model_that_always_says_no():
    scores = pope_scores(["No", "No"], [True, False])
    shown = ("accuracy", "precision", "recall", "F1", "yes_ratio")
    assert [scores[name] for name in shown] == [50, 0, 0, 0, 0]


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
def test_answers_are_parsed_as_pope_does(answer, yes):
    assert pope.parse_yes_no(answer) is yes


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", True),
        ("NO!", False),
        ("no", False),
        ("No\nthere is none", False),
        ("Yes, there is no doubt.", True),  # the first word decides
        ("**Yes**", True),
        ("The answer is no.", False),
        ("I would say yes", True),
        ("yes or no", True),
        ("It may be yes or no", None),
        ("There is not a dog", None),
        ("Nothing", None),
        ("yesterday", None),
        ("a dog", None),
        ("", None),
    ],
)
def test_strict_parsing_takes_yes_and_no_only_if_explicit(answer, said):
    assert pope.parse_strictly(answer) is said


def official(answer: str) -> bool:
    """POPE's parsing, step by step as FORMATS tells it."""
    end = answer.find(".")
    words = (answer[:end] if end != -1 else answer).replace(",", "").split(" ")
    return not ("No" in words or "not" in words or "no" in words)


@given(strings.lists(strings.sampled_from(["No", "no", "not", "NO", "yes", ".", ",", " ", "\n", "a", "know"])))
def test_the_official_parsing_agrees_with_a_second_implementation(pieces):
    assert pope.parse_yes_no("".join(pieces)) is official("".join(pieces))


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_a_perfect_answer_to_the_real_pope_files_scores_100(split):
    file = POPE / f"coco_pope_{split}.json"
    if not file.is_file():
        pytest.skip("The POPE files are not beside this checkout.")
    labels = [json.loads(line)["label"] for line in file.read_text().splitlines()]
    assert len(labels) == 3000
    assert labels.count("yes") == labels.count("no") == 1500
    scores = pope_scores(labels, [label == "yes" for label in labels])
    assert [scores[name] for name in ("accuracy", "precision", "recall", "F1", "yes_ratio")] == [100, 100, 100, 100, 50]


def test_objects_are_found_as_whole_words():
    vocabulary = {"one", "ring", "star", "dining table"}
    assert mentioned_objects("A bone and a string.", vocabulary) == set()
    assert mentioned_objects("One star, on the dining table!", vocabulary) == {"one", "star", "dining table"}
    assert mentioned_objects("A someone saw one Cat, stonework.", {"one", "cat", "stone"}) == {"one", "cat"}
    assert mentioned_objects("a dining room and a table", vocabulary) == set()


def test_words_of_a_longer_object_are_no_shorter_one():
    vocabulary = {"fire", "fire engine", "Christmas tree"}
    assert mentioned_objects("A fire engine and a christmas tree.", vocabulary) == {"fire engine", "Christmas tree"}
    assert mentioned_objects("fire engine and fire.", vocabulary) == {"fire", "fire engine"}
    assert mentioned_objects("fire", set()) == set()
