"""How images and texts lie together in the space of embeddings."""

from pathlib import Path

import numpy as np

from cafe.evaluation.metrics import alignment, modality_gap, uniformity
from cafe.evaluation.retrieval import embed, find_retrieval, read
from cafe.evaluation.subject import Subject
from cafe.evaluation.suite import Evaluation, Suite


def run(model: Subject, data: Path, limit: int | None) -> Evaluation:
    """Measures the collection that retrieval measures."""
    collection = read(data, find_retrieval(data)[0], limit, None)
    embedded = embed(model, data, collection)
    images, texts, owner = embedded.images, embedded.texts, collection.owner
    similarity = images @ texts.T
    relevant = np.arange(len(images))[:, None] == owner[None, :]
    matched, mismatched = similarity[relevant], similarity[~relevant]
    bins = np.linspace(-1, 1, 81)
    return Evaluation(
        {
            "geometry/modality_gap": modality_gap(images, texts),
            "geometry/alignment": alignment(images[owner], texts),
            "geometry/uniformity": uniformity(np.concatenate([images, texts])),
            "geometry/matched_similarity": float(matched.mean()),
            "geometry/mismatched_similarity": float(mismatched.mean()),
        },
        samples={
            "histogram": {
                "bins": bins.tolist(),
                "matched": np.histogram(matched, bins, density=True)[0].tolist(),
                "mismatched": np.histogram(mismatched, bins, density=True)[0].tolist(),
            }
        },
    )


GEOMETRY = Suite(
    name="geometry",
    measures="the modality gap, alignment and uniformity of a collection's embeddings",
    files=("what retrieval expects",),
    where="as for retrieval",
    sources=("arXiv 2203.02053 (modality gap)", "arXiv 2005.10242 (alignment, uniformity)"),
    find=find_retrieval,
    run=run,
)
