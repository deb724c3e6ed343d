"""The numbers, in plain NumPy: no model and no file. Rates are in percent."""

import re

import numpy as np
from jaxtyping import Bool, Float, Int

_BLOCK = 1024  # rows compared at once, so that memory grows with the rows and not with their square
_SAME = 1e-6  # cosines this near are one: equal vectors may differ by this in float32, where they stand in a matrix


def ranks(
    queries: Float[np.ndarray, "queries dim"],
    candidates: Float[np.ndarray, "candidates dim"],
    query_group: Int[np.ndarray, " queries"],
    candidate_group: Int[np.ndarray, " candidates"],
) -> Int[np.ndarray, " queries"]:
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
) -> Int[np.ndarray, " queries"]:
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


def separability(
    images: Float[np.ndarray, "images dim"], texts: Float[np.ndarray, "texts dim"], penalty: float = 1e-2
) -> float:
    """How often a linear classifier tells images from texts, in percent, on rows it was not fitted to; chance is 50.

    Ridge regression on the sides' signs, equally many rows of each (2,000 at most), fitted to every other row and tried
    on the rest, both ways. A single row of a side leaves nothing to fit or to try: it is given what chance is.
    """
    count = min(len(images), len(texts), 2000)
    if count < 2:
        return 50.0
    picked = [side[np.linspace(0, len(side) - 1, count).astype(int)].astype(np.float64) for side in (images, texts)]
    right = []
    for fold in (0, 1):
        fitted = np.concatenate([side[fold::2] for side in picked])
        tried = np.concatenate([side[1 - fold :: 2] for side in picked])
        signs = np.repeat([1.0, -1.0], [len(picked[0][fold::2]), len(picked[1][fold::2])])
        centre = fitted.mean(axis=0)
        centred = fitted - centre
        weights = np.linalg.solve(
            centred.T @ centred + penalty * np.eye(fitted.shape[1]), centred.T @ (signs - signs.mean())
        )
        scores = (tried - centre) @ weights + signs.mean()
        right.append((scores > 0) == (np.arange(len(tried)) < len(picked[0][1 - fold :: 2])))
    return 100 * float(np.concatenate(right).mean())


def effective_rank(rows: Float[np.ndarray, "rows dim"]) -> float:
    """How many dimensions are used: exp of the entropy of the shares of the singular values (Roy & Vetterli, 2007)."""
    exact = rows.astype(np.float64)
    gram = exact.T @ exact if len(exact) >= exact.shape[1] else exact @ exact.T
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def hubness(
    queries: Float[np.ndarray, "queries dim"], candidates: Float[np.ndarray, "candidates dim"], k: int = 10
) -> float:
    """Skewness of how often each candidate is among the k nearest of a query (Radovanović et al., JMLR 11, 2010).

    0 where all candidates are found equally often; large where a few hubs are near to everything.
    """
    k = min(k, len(candidates))
    found = np.zeros(len(candidates))
    for start in range(0, len(queries), _BLOCK):
        nearest = np.argpartition(-(queries[start : start + _BLOCK] @ candidates.T), k - 1, axis=1)[:, :k]
        found += np.bincount(nearest.ravel(), minlength=len(candidates))
    deviation = found - found.mean()
    spread = np.sqrt((deviation**2).mean())
    return float((deviation**3).mean() / spread**3) if spread else 0.0


def similarities(
    images: Float[np.ndarray, "images dim"],
    texts: Float[np.ndarray, "texts dim"],
    owner: Int[np.ndarray, " texts"],
    bins: Float[np.ndarray, " edges"],
) -> tuple[float, float, Int[np.ndarray, " bins"], Int[np.ndarray, " bins"]]:
    """Mean cosine of matched and of mismatched pairs of an image and a text, and how many of each fall in each bin."""
    sums, counts = np.zeros(2), np.zeros(2)
    histograms = np.zeros((2, len(bins) - 1), np.int64)
    for start in range(0, len(images), _BLOCK):
        block = images[start : start + _BLOCK] @ texts.T
        relevant = np.arange(start, start + len(block))[:, None] == owner
        for side, values in enumerate((block[relevant], block[~relevant])):
            sums[side] += values.sum(dtype=np.float64)
            counts[side] += len(values)
            histograms[side] += np.histogram(np.clip(values, bins[0], bins[-1]), bins)[0]
    matched, mismatched = sums / np.maximum(counts, 1)
    return float(matched), float(mismatched), histograms[0], histograms[1]


def mentioned_objects(text: str, vocabulary: set[str]) -> set[str]:
    """The terms of a closed vocabulary that a text mentions as whole words, in upper or lower case."""
    return {term for term in vocabulary if re.search(rf"\b{re.escape(term)}\b", text, re.IGNORECASE)}


def ndcg_at_k(
    similarity: Float[np.ndarray, "queries candidates"], gains: Float[np.ndarray, "queries candidates"], k: int
) -> Float[np.ndarray, " queries"]:
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
