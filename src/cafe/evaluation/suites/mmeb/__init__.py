"""MMEB: 36 datasets of images, 18 of videos (as frames) and 24 of visual documents, each a query among candidates.

V1 (arXiv 2410.05160) gives each query its own candidates, of which the first is right, and counts Precision@1. V2
(arXiv 2507.04590) adds videos, scored alike, of which some datasets rank all their candidates for every query; and
documents, where a query ranks the pages of a whole corpus with graded relevance, scored by NDCG@5. The groups of
datasets and the prompts of documents are those of VLM2Vec's code (github.com/TIGER-AI-Lab/VLM2Vec).

Contents are embedded in multimodal mode: the record's text and images are the user's turn, nothing is added. A mean
over datasets weighs each dataset alike, as the leaderboard does. Ties count against the model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate
from cafe.evaluation.suites.mmeb.datasets import Dataset, find_datasets, lookup
from cafe.evaluation.suites.mmeb.leaderboard import describe, means, score_files, score_query
from cafe.evaluation.suites.mmeb.readers import FOLDERS, Query, Side, read_corpus, read_records, to_content


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Measure every dataset that is there, the first `limit` queries of each."""
    model = model.with_prompts(mode="multimodal")
    result = EvaluationResult()
    scores: dict[str, dict[str, float]] = {}
    for name, path in find_datasets(data).items():
        dataset = lookup(name, path)
        queries = _read(name, path, dataset, data, limit)
        rows = []
        for query, similarity in zip(queries, embed(model, data, path, queries), strict=True):
            rows.append(_output_row(query, similarity, name, dataset))
        result.outputs[f"mmeb/{name}"] = rows
        result.results |= aggregate(rows)
        scores[name] = _average_scores(rows)

    # The means come after all datasets, and are not averaged themselves.
    measured = list(result.results)
    for mean, averaged in means(measured).items():
        result.add_mean(mean, averaged)
    result.results["mmeb/overall/datasets"] = len(measured)
    result.files = score_files(scores, describe(model.model))
    return result


def _read(name: str, path: Path, dataset: Dataset, data: Path, limit: int | None) -> list[Query]:
    """Read the queries of a dataset in the format of its modality.

    Args:
        name: the dataset's.
        path: its file or folder.
        dataset: what is known of it.
        data: the folder of evaluation files.
        limit: the number of queries; all of them if None.
    """
    if dataset.modality == "visdoc":
        return read_corpus(path, limit)
    video = name if dataset.modality == "video" else ""
    return read_records(path, limit, video=video, rank_all=dataset.ranks_all_candidates, data=data)


def embed(
    model: CachedModel, data: Path, source: Path, queries: Sequence[Query]
) -> list[Float[np.ndarray, " candidates"]]:
    """Compute the similarity of each query to its candidates. Equal contents are embedded once.

    Args:
        model: the model.
        data: the folder of evaluation files.
        source: the file of the queries, for errors.
        queries: the queries of one dataset.
    """
    row_of: dict[Side, int] = {}  # numbers the distinct sides, in the order in which they are embedded
    candidate_rows: dict[int, Int[np.ndarray, " candidates"]] = {}  # by identity: queries may share a list
    for query in queries:
        row_of.setdefault(query.side, len(row_of))
        if id(query.candidates) not in candidate_rows:
            rows = [row_of.setdefault(candidate, len(row_of)) for candidate in query.candidates]
            candidate_rows[id(query.candidates)] = np.array(rows)
    # One call for the whole dataset, so that batches are full.
    vectors = model.embed([to_content(side, data, source) for side in row_of])
    return [vectors[candidate_rows[id(query.candidates)]] @ vectors[row_of[query.side]] for query in queries]


def _output_row(
    query: Query, similarity: Float[np.ndarray, " candidates"], name: str, dataset: Dataset
) -> dict[str, Any]:
    """Make a query's output row: its best candidate and its scores.

    Args:
        query: the query.
        similarity: of the query to each of its candidates.
        name: the dataset's.
        dataset: decides which score counts.
    """
    scores = score_query(similarity, query.gains)
    # Documents have graded relevance.
    if dataset.modality == "visdoc":
        metric, value = "NDCG@5", scores["ndcg_linear@5"]
    else:
        metric, value = "P@1", scores["hit@1"]
    best = query.candidates[int(np.argmax(similarity))]
    row = {"id": query.id, "asked": query.side.text, "said": best.text}
    # The report shows the first image that is a file; those inside a parquet file have no name.
    image = next((image for image in best.images if isinstance(image, str)), None)
    if image:
        row["image"] = image
    return {**row, "right": scores["hit@1"] == 1, "scores": scores, "marks": {f"mmeb/{name}/{metric}": value}}


def _average_scores(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Average the scores of a dataset's queries, for the leaderboard."""
    averages: dict[str, float] = {}
    for metric in rows[0]["scores"]:
        values = [row["scores"][metric] for row in rows]
        averages[metric] = float(np.mean(values))
    # The leaderboard compares the number of predictions with that of queries; here they are always the same.
    return averages | {"num_pred": len(rows), "num_data": len(rows)}


MMEB = Suite(
    name="mmeb",
    measures="queries of text, image or both find their match: 36 datasets, and V2's videos and documents",
    files=(
        "mmeb_eval/NAME.parquet, .jsonl, or mmeb_eval/NAME/test*.parquet: a dataset's records",
        "mmeb_eval/NAME/{queries,corpus,qrels}/*.parquet: a visual-document dataset of V2",
        "mmeb_eval/NAME.parquet or .jsonl: a video dataset of V2, in the columns of its Hub dataset VLM2Vec/NAME",
        "their images and folders of frames, in the folder itself or in " + ", ".join(FOLDERS[1:]),
    ),
    download="the Hub datasets TIGER-Lab/MMEB-eval (V1), ziyjiang/MMEB_Test_Instruct and TIGER-Lab/MMEB-V2; "
    "a small version is written by `cafe scenes write DIR`",
    sources=("arXiv 2410.05160", "arXiv 2507.04590"),
    find_files=lambda data: list(find_datasets(data).values()),
    run=run,
    default=False,
    headline=("mmeb/overall/mean",),
    retrieval=("mmeb/overall/mean",),
    no_direction=("mmeb/overall/datasets",),
    labels={"mmeb/overall/mean": "MMEB, mean over datasets"},
)
