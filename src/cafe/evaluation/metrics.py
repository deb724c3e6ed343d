"""Metrics on arrays, in NumPy, SciPy and scikit-learn: no model and no file. Rates are in percent."""

import re

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import skew
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict

_BLOCK = 1024  # rows compared at once, so that memory grows with the rows and not with their square
# Cosines closer than this count as equal. The product of two equal vectors may differ by this much in float32,
# depending on where they stand in a matrix.
_TIE_TOLERANCE = 1e-6


def ranks(
    queries: Float[np.ndarray, "queries dim"],
    candidates: Float[np.ndarray, "candidates dim"],
    query_group: Int[np.ndarray, " queries"],
    candidate_group: Int[np.ndarray, " candidates"],
) -> Int[np.ndarray, " queries"]:
    """Count, for each query, the candidates of other groups that rank before the best one of its own; 0 is best.

    Ties count against the model: a candidate whose score is equal, up to float32 rounding, ranks before the match.
    So a collapsed model finds nothing; neither does one whose similarities are NaN, nor a query without a match.
    """
    # A block of queries at a time: the whole matrix of similarities may not fit in memory.
    parts = []
    for start in range(0, len(queries), _BLOCK):
        block = slice(start, start + _BLOCK)
        relevant = query_group[block, None] == candidate_group
        parts.append(rank_of_match(queries[block] @ candidates.T, relevant))
    if not parts:
        return np.zeros(0, np.int64)
    return np.concatenate(parts)


def ranks_of_pairs(
    queries: Float[np.ndarray, "queries dim"],
    candidates: Float[np.ndarray, "candidates dim"],
    pairs: Int[np.ndarray, "pairs 2"],
) -> Int[np.ndarray, " queries"]:
    """Count as `ranks` does where a candidate may be right for several groups.

    Args:
        queries: unit rows.
        candidates: unit rows.
        pairs: the numbers of a query and of a candidate that is right for it.
    """
    result = np.zeros(len(queries), np.int64)
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK]
        relevant = np.zeros((len(block), len(candidates)), bool)
        query, candidate = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + _BLOCK)].T
        relevant[query - start, candidate] = True
        result[start : start + _BLOCK] = rank_of_match(block @ candidates.T, relevant)
    return result


def rank_of_match(
    similarity: Float[np.ndarray, "queries candidates"], relevant: Bool[np.ndarray, "queries candidates"]
) -> Int[np.ndarray, " queries"]:
    """Count the irrelevant candidates that score at least as high as a query's best match, as `ranks` does."""
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    # Written as "not clearly below the best" rather than "at least the best", so that NaN ranks before the match.
    clearly_below = similarity < best - _TIE_TOLERANCE
    return (~clearly_below & ~relevant).sum(axis=1)


def modality_gap(images: Float[np.ndarray, "images dim"], texts: Float[np.ndarray, "texts dim"]) -> float:
    """Compute the distance between the centroids of unit image and text embeddings (arXiv 2203.02053)."""
    return float(np.linalg.norm(images.mean(axis=0) - texts.mean(axis=0)))


def alignment(queries: Float[np.ndarray, "pairs dim"], targets: Float[np.ndarray, "pairs dim"]) -> float:
    """Compute the mean squared distance of matching unit rows (Wang & Isola, arXiv 2005.10242)."""
    return float(((queries - targets) ** 2).sum(axis=1).mean())


def uniformity(rows: Float[np.ndarray, "rows dim"]) -> float:
    """Compute the log of the mean Gaussian potential exp(-2 d²) over distinct pairs of unit rows (arXiv 2005.10242)."""
    exact = rows.astype(np.float64)
    potential = 0.0
    for start in range(0, len(exact), _BLOCK):
        cosines = exact[start : start + _BLOCK] @ exact.T
        potential += float(np.exp(4 * cosines - 4).sum())  # d² = 2 - 2 cos
    # A row's pair with itself has d = 0 and potential 1; those are subtracted again.
    distinct_pairs = len(exact) * (len(exact) - 1)
    return float(np.log((potential - len(exact)) / distinct_pairs))


def separability(
    images: Float[np.ndarray, "images dim"], texts: Float[np.ndarray, "texts dim"], penalty: float = 1e-2
) -> float:
    """Compute how often a linear classifier tells images from texts on held-out rows, in percent; chance is 50.

    A ridge classifier is fitted to every other row and tested on the rest, both ways, on equally many rows of each
    side, at most 2,000. With a single row of a side there is nothing to fit or to test: the result is chance.
    """
    count = min(len(images), len(texts), 2000)
    if count < 2:
        return 50.0
    chosen = np.linspace(0, len(images) - 1, count).astype(int), np.linspace(0, len(texts) - 1, count).astype(int)
    rows = np.concatenate([images[chosen[0]], texts[chosen[1]]]).astype(np.float64)
    if not np.isfinite(rows).all():
        return 50.0  # scikit-learn refuses NaN, which no classifier can tell apart
    is_image = np.repeat([True, False], count)
    # Neighboring rows are often alike (captions of one image), so the folds alternate within each side.
    folds = PredefinedSplit(np.tile(np.arange(count) % 2, 2))
    predicted = cross_val_predict(RidgeClassifier(alpha=penalty), rows, is_image, cv=folds)
    return 100 * float((predicted == is_image).mean())


def effective_rank(rows: Float[np.ndarray, "rows dim"]) -> float:
    """Compute how many dimensions are used: exp of the entropy of the normalized singular values (Roy & Vetterli).

    It is NaN for rows that are not finite, whose singular values LAPACK does not find.
    """
    if not np.isfinite(rows).all():
        return float("nan")
    exact = rows.astype(np.float64)
    # The smaller of the two Gram matrices has the same nonzero eigenvalues: the squared singular values.
    gram = exact.T @ exact if len(exact) >= exact.shape[1] else exact @ exact.T
    singular_values = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    weights = singular_values[singular_values > 0] / singular_values.sum()
    return float(np.exp(-(weights * np.log(weights)).sum()))


def hubness(
    queries: Float[np.ndarray, "queries dim"], candidates: Float[np.ndarray, "candidates dim"], k: int = 10
) -> float:
    """Compute the skewness of how often each candidate is among a query's k nearest (Radovanović et al., JMLR 2010).

    It is 0 if all candidates are found equally often, and large if a few hubs are near to everything.
    """
    k = min(k, len(candidates))
    counts = np.zeros(len(candidates))
    for start in range(0, len(queries), _BLOCK):
        similarity = queries[start : start + _BLOCK] @ candidates.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        counts += np.bincount(nearest.ravel(), minlength=len(candidates))
    if np.ptp(counts) == 0:
        return 0.0  # SciPy calls the skewness of equal values NaN
    return float(skew(counts))


def similarities(
    images: Float[np.ndarray, "images dim"],
    texts: Float[np.ndarray, "texts dim"],
    owner: Int[np.ndarray, " texts"],
    bins: Float[np.ndarray, " edges"],
) -> tuple[float, float, Int[np.ndarray, " bins"], Int[np.ndarray, " bins"]]:
    """Compute the mean cosine of matched and of mismatched pairs of image and text, and a histogram of each.

    Args:
        images: unit rows.
        texts: unit rows.
        owner: for each text, the number of its image.
        bins: the edges of the histograms' bins; what lies outside is counted in the outermost.
    """
    sums, counts = np.zeros(2), np.zeros(2)
    histograms = np.zeros((2, len(bins) - 1), np.int64)
    for start in range(0, len(images), _BLOCK):
        cosines = images[start : start + _BLOCK] @ texts.T
        matched = np.arange(start, start + len(cosines))[:, None] == owner
        for side, values in enumerate((cosines[matched], cosines[~matched])):
            sums[side] += values.sum(dtype=np.float64)
            counts[side] += len(values)
            histograms[side] += np.histogram(np.clip(values, bins[0], bins[-1]), bins)[0]
    means = sums / np.maximum(counts, 1)
    return float(means[0]), float(means[1]), histograms[0], histograms[1]


def roc_auc(scores: Float[np.ndarray, " samples"], is_positive: Bool[np.ndarray, " samples"]) -> float:
    """Compute the area under the ROC curve, in percent: how often a positive sample scores higher than a negative one.

    Ties count half, so chance is 50. It is NaN where there is no such pair, or where a score is not finite.
    """
    if is_positive.all() or not is_positive.any() or not np.isfinite(scores).all():
        return float("nan")  # scikit-learn warns of the former, and refuses the latter
    return 100 * float(roc_auc_score(is_positive, scores))


def mentioned_objects(text: str, vocabulary: set[str]) -> set[str]:
    """Find the terms of a closed vocabulary that a text mentions as whole words, in upper or lower case.

    Words that are a longer term are no shorter one: if both are terms, "a fire engine" mentions no "fire".
    """
    longest_first = sorted(vocabulary, key=len, reverse=True)
    pattern = rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b"
    mentioned = {found.lower() for found in re.findall(pattern, text, re.IGNORECASE)}
    return {term for term in vocabulary if term.lower() in mentioned}


def ndcg_at_k(
    similarity: Float[np.ndarray, "queries candidates"], gains: Float[np.ndarray, "queries candidates"], k: int
) -> Float[np.ndarray, " queries"]:
    """Compute NDCG@k with ties and NaN counting against the model, where scikit-learn's `ndcg_score` averages ties.

    Of candidates with equal scores, the one with the least gain comes first, and a candidate without a score (NaN)
    comes where it hurts most. The gain at rank i (from 1) is divided by log2(i + 1), and the sum over the first k by
    that of the best order (Järvelin & Kekäläinen 2002): from 0 to 1. It is 0 if nothing is relevant to a query.
    """
    # NaN hurts most when a relevant candidate comes last and an irrelevant one first.
    worst = np.where(gains > 0, -np.inf, np.inf)
    scores = np.where(np.isnan(similarity), worst, np.round(similarity.astype(np.float64), 6))
    order = np.lexsort((gains, -scores), axis=1)[:, :k]
    discount = 1 / np.log2(np.arange(2, order.shape[1] + 2))
    gained = (np.take_along_axis(gains, order, axis=1) * discount).sum(axis=1)
    ideal = (-np.sort(-gains, axis=1)[:, :k] * discount).sum(axis=1)
    return np.divide(gained, ideal, out=np.zeros(len(gains)), where=ideal > 0)
