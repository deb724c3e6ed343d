"""MMEB's scores: hits and NDCG of one query, means over groups of datasets, and the leaderboard's files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from cafe.evaluation.metrics import ndcg_at_k, rank_of_match
from cafe.evaluation.suites.mmeb.datasets import DATASETS

KS = (1, 5, 10)
REPAIRED = ("ViDoSeek-page", "MMLongBench-page")  # the leaderboard has these with a suffix: their pages were repaired


def score_query(similarity: Float[np.ndarray, " candidates"], gains: dict[int, float]) -> dict[str, float]:
    """Compute hit@k (a right candidate is among the first k) and ndcg_linear@k of one query, from 0 to 1.

    Args:
        similarity: of the query to each candidate.
        gains: of the right candidates, by number.
    """
    # The metrics take a matrix of queries; this is one row of it.
    gain = np.zeros(len(similarity))
    gain[list(gains)] = list(gains.values())
    [rank] = rank_of_match(similarity[None], gain[None] > 0)
    hits = {f"hit@{k}": float(rank < k) for k in KS}
    ndcg = {f"ndcg_linear@{k}": float(ndcg_at_k(similarity[None], gain[None], k)[0]) for k in KS}
    return hits | ndcg


def means(results: Sequence[str]) -> dict[str, list[str]]:
    """List the results that each mean averages: each meta-task, V1 in and out of distribution, each modality, all.

    Args:
        results: the names `mmeb/DATASET/METRIC` of what was measured.
    """
    groups: dict[str, list[str]] = {}
    for result in results:
        _, name, metric = result.split("/")
        # The mean over everything mixes Precision@1 and NDCG@5, as the leaderboard does.
        groups.setdefault("mmeb/overall/mean", []).append(result)
        for group in _groups_of(name):
            groups.setdefault(f"mmeb/{group}/{metric}", []).append(result)
    return groups


def _groups_of(name: str) -> list[str]:
    """Name the groups of a dataset; a dataset of your own has none."""
    dataset = DATASETS.get(name)
    if dataset is None:
        return []
    groups = [dataset.task, dataset.modality]
    if dataset.in_distribution is not None:
        groups.append("IND" if dataset.in_distribution else "OOD")
    return groups


def score_files(scores: dict[str, dict[str, float]], metadata: dict[str, Any]) -> dict[str, Any]:
    """Make the files that VLM2Vec's code and the leaderboard read, by name.

    `mmeb/NAME_score.json` of each dataset with one right candidate is V1's: `acc`, `num_correct`, `num_pred`.
    `mmeb/leaderboard.json` is V2's: the metadata, and the metrics of every dataset by modality.

    Args:
        scores: by dataset, the averages of `score_query`'s scores, and the number of queries as `num_pred`.
        metadata: describes the model.
    """
    files: dict[str, Any] = {}
    # V1 knows no graded relevance, so its files leave out documents.
    for name, values in scores.items():
        if name in DATASETS and DATASETS[name].modality == "visdoc":
            continue
        accuracy, num_queries = values["hit@1"], values["num_pred"]
        counts = {"acc": accuracy, "num_correct": round(accuracy * num_queries), "num_pred": num_queries}
        files[f"mmeb/{name}_score.json"] = counts
    # V2 lists every dataset, also those that were not measured.
    metrics: dict[str, dict[str, Any]] = {}
    for name, dataset in DATASETS.items():
        leaderboard_name = f"{name}-fixed" if name in REPAIRED else name
        metrics.setdefault(dataset.modality, {})[leaderboard_name] = scores.get(name, "FILE_N/A")
    files["mmeb/leaderboard.json"] = {"metadata": metadata, "metrics": metrics}
    return files


def describe(model: Any) -> dict[str, Any]:
    """Make the leaderboard's metadata of a model, as far as the model knows it; the submitter fills in the rest."""
    metadata: dict[str, Any] = {
        "model_name": None,
        "model_backbone": None,
        "model_size": None,
        "embedding_dimension": None,
        "max_length_tokens": None,
        "model_release_date": None,
        "data_source": "Self-Reported",
        "url": None,
    }
    # A model that is not a `Cafe` may have no weights to describe.
    lvlm = getattr(model, "lvlm", None)
    if not lvlm:
        return metadata
    text_config = lvlm.config.get_text_config()
    num_parameters = sum(parameter.numel() for parameter in lvlm.parameters())
    return metadata | {
        "model_name": Path(lvlm.name_or_path).name,
        "model_backbone": lvlm.config.model_type,
        "model_size": f"{num_parameters / 1e9:.2g}B parameters",
        "embedding_dimension": text_config.hidden_size,
        "max_length_tokens": getattr(text_config, "max_position_embeddings", None),
    }
