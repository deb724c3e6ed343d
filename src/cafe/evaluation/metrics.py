"""The numbers, in plain NumPy: no model and no file. Rates are in percent."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

_BLOCK = 1024  # rows compared at once, so that memory grows with the rows and not with their square


def recall_at_k(
    similarity: Float[np.ndarray, "queries candidates"],
    relevant: Bool[np.ndarray, "queries candidates"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[int, float]:
    """Share of queries, in percent, with a relevant candidate among the first k.

    Ties count against us: a query's rank is the number of irrelevant candidates that score at least as high as its best
    relevant one, so a collapsed model scores nothing; neither does one whose similarities are NaN.
    """
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    rank = (~(similarity < best) & ~relevant).sum(axis=1)
    return {k: 100 * float((rank < k).mean()) for k in ks}


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


def binary_scores(answers: Sequence[bool], labels: Sequence[bool]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and yes-ratio in percent; "yes" is the positive class, 0 where undefined."""
    said, true = np.asarray(answers, bool), np.asarray(labels, bool)
    hits = int((said & true).sum())
    precision = hits / max(1, int(said.sum()))
    recall = hits / max(1, int(true.sum()))
    scores = {
        "accuracy": float((said == true).mean()),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": float(said.mean()),
    }
    return {name: 100 * value for name, value in scores.items()}


def parse_yes_no(answer: str) -> bool:
    """POPE's own reading of an answer: "no" if its first sentence holds the word No, not or no, and "yes" otherwise."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def mentioned_objects(text: str, vocabulary: set[str]) -> set[str]:
    """The terms of a closed vocabulary that a text mentions as whole words, in upper or lower case."""
    return {term for term in vocabulary if re.search(rf"\b{re.escape(term)}\b", text, re.IGNORECASE)}


def object_scores(mentioned: Sequence[set[str]], present: Sequence[set[str]]) -> dict[str, float]:
    """Precision, recall and the hallucinated share of the objects mentioned, over all texts, in percent."""
    said = sum(map(len, mentioned))
    right = sum(len(words & objects) for words, objects in zip(mentioned, present, strict=True))
    return {
        "precision": 100 * right / max(1, said),
        "recall": 100 * right / max(1, sum(map(len, present))),
        "hallucinated": 100 * (said - right) / max(1, said),
    }
