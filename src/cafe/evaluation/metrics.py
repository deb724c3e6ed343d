"""The numbers, in plain NumPy: no model and no file. Rates are in percent."""

import re

import numpy as np
from jaxtyping import Bool, Float, Int

_BLOCK = 1024  # rows compared at once, so that memory grows with the rows and not with their square
_SAME = 1e-6  # cosines this near are one: equal vectors may differ by this in float32, where they stand in a matrix


def ranks(
    queries: Float[np.ndarray, "queries dim"],
    candidates: Float[np.ndarray, "candidates dim"],
    query_group: Int[np.ndarray, "queries"],
    candidate_group: Int[np.ndarray, "candidates"],
) -> Int[np.ndarray, "queries"]:
    """For each query, how many candidates of other groups come before the best one of its own; 0 is best.

    Ties count against the model: a candidate that scores as high, to float32's rounding, comes before. So a collapsed
    model finds nothing; neither does one whose similarities are NaN, nor a query without a match. Similarities are
    computed in blocks of queries.
    """
    blocks = range(0, len(queries), _BLOCK)
    parts = [
        rank_of_match(queries[s : s + _BLOCK] @ candidates.T, query_group[s : s + _BLOCK, None] == candidate_group)
        for s in blocks
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def rank_of_match(
    similarity: Float[np.ndarray, "queries candidates"], relevant: Bool[np.ndarray, "queries candidates"]
) -> Int[np.ndarray, "queries"]:
    """`ranks` of given similarities: the number of irrelevant candidates that score at least as high as a match."""
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    return (~(similarity < best - _SAME) & ~relevant).sum(axis=1)


def modality_gap(images: Float[np.ndarray, "images dim"], texts: Float[np.ndarray, "texts dim"]) -> float:
    """Distance between the centroids of unit image and text embeddings (Liang et al., arXiv 2203.02053)."""
    return float(np.linalg.norm(images.mean(axis=0) - texts.mean(axis=0)))


def alignment(queries: Float[np.ndarray, "pairs dim"], targets: Float[np.ndarray, "pairs dim"]) -> float:
    """Mean squared distance of matching unit rows (Wang & Isola, arXiv 2005.10242)."""
    return float(((queries - targets) ** 2).sum(axis=1).mean())


def uniformity(rows: Float[np.ndarray, "rows dim"]) -> float:
    """Log of the mean Gaussian potential exp(-2 d²) over distinct pairs of unit rows (arXiv 2005.10242)."""
    exact = rows.astype(np.float64)
    blocks = range(0, len(exact), _BLOCK)
    potential = sum(float(np.exp(4 * (exact[start : start + _BLOCK] @ exact.T) - 4).sum()) for start in blocks)
    # d² = 2 - 2 cos; each row's pair with itself has d = 0 and is taken off again.
    return float(np.log((potential - len(exact)) / (len(exact) * (len(exact) - 1))))


def mentioned_objects(text: str, vocabulary: set[str]) -> set[str]:
    """The terms of a closed vocabulary that a text mentions as whole words, in upper or lower case."""
    return {term for term in vocabulary if re.search(rf"\b{re.escape(term)}\b", text, re.IGNORECASE)}


def ndcg_at_k(
    similarity: Float[np.ndarray, "queries candidates"], gains: Float[np.ndarray, "queries candidates"], k: int
) -> Float[np.ndarray, "queries"]:
    """Normalised discounted cumulative gain of the first k candidates (Järvelin & Kekäläinen 2002), from 0 to 1.

    The gain at place i (from 1) is divided by log2(i + 1). Ties count against the model: of candidates that score
    alike, the one with the least gain comes first, and a candidate without a similarity (NaN) comes where it does most
    harm. 0 for a query to which nothing is relevant.
    """
    worst = np.where(gains > 0, -np.inf, np.inf)
    scores = np.where(np.isnan(similarity), worst, np.round(similarity.astype(np.float64), 6))
    order = np.lexsort((gains, -scores), axis=1)[:, :k]
    discount = 1 / np.log2(np.arange(2, order.shape[1] + 2))
    found = (np.take_along_axis(gains, order, axis=1) * discount).sum(axis=1)
    best = (-np.sort(-gains, axis=1)[:, :k] * discount).sum(axis=1)
    return np.divide(found, best, out=np.zeros(len(gains)), where=best > 0)
