"""MMEB's groups of datasets, the scores of one query against brute force, and means over groups."""

import numpy as np
import pytest

from cafe.evaluation.suite import EvaluationResult
from cafe.evaluation.suites.mmeb.datasets import DATASETS
from cafe.evaluation.suites.mmeb.leaderboard import means, score_query


@pytest.mark.parametrize("seed", range(5))
def test_precision_at_1_agrees_with_looking_at_every_candidate(seed):
    random = np.random.default_rng(seed)
    for _ in range(50):
        similarity = random.integers(0, 4, random.integers(1, 6)).astype(float)
        right = all(similarity[0] > other for other in similarity[1:])
        at = score_query(similarity, {0: 1.0})
        assert at["hit@1"] == right
        worse = sum(other >= similarity[0] for other in similarity[1:])
        assert at["hit@5"] == (worse < 5) and at["hit@10"] == 1


def test_a_single_candidate_is_found_and_nan_finds_nothing():
    assert score_query(np.array([0.1]), {0: 1.0})["hit@1"] == 1
    assert score_query(np.array([np.nan]), {0: 1.0})["ndcg_linear@1"] == 1  # there is nothing to come before it
    assert score_query(np.array([np.nan, 0.0]), {0: 1.0})["hit@1"] == 0
    assert score_query(np.array([0.5, np.nan]), {0: 1.0})["hit@1"] == 0


def test_all_78_datasets_are_known_with_their_groups():
    counted = {
        (modality, trained): sum(d.modality == modality and d.in_distribution is trained for d in DATASETS.values())
        for modality in ("image", "video", "visdoc")
        for trained in (True, False, None)
    }
    assert counted[("image", True)] == 20 and counted[("image", False)] == 16
    assert counted[("video", None)] == 18 and counted[("visdoc", None)] == 24 and len(DATASETS) == 78
    tasks = [dataset.task for dataset in DATASETS.values() if dataset.modality == "image"]
    assert {task: tasks.count(task) for task in tasks} == {
        "classification": 10,
        "vqa": 10,
        "retrieval": 12,
        "grounding": 4,
    }


def test_means_weigh_each_dataset_alike():
    results = {"mmeb/SUN397/P@1": 60.0, "mmeb/ObjectNet/P@1": 20.0, "mmeb/MSCOCO/P@1": 10.0, "mmeb/K700/P@1": 50.0}
    done = EvaluationResult({**results, "mmeb/VisRAG_PlotQA/NDCG@5": 30.0, "mmeb/mine/P@1": 4.0})
    groups = means(list(done.results))
    for name, of in groups.items():
        done.add_mean(name, of)
    assert {name: done.results[name] for name in groups} == pytest.approx(
        {
            "mmeb/classification/P@1": 40,
            "mmeb/grounding/P@1": 10,
            "mmeb/image/P@1": 30,
            "mmeb/IND/P@1": 35,
            "mmeb/OOD/P@1": 20,
            "mmeb/video_classification/P@1": 50,
            "mmeb/video/P@1": 50,
            "mmeb/visrag/NDCG@5": 30,
            "mmeb/visdoc/NDCG@5": 30,
            "mmeb/overall/mean": 29,
        }
    )
