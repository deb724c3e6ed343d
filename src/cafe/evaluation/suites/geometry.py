"""How images and texts lie together in the space of embeddings, for every collection that retrieval measures."""

from pathlib import Path

import numpy as np

from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.metrics import (
    alignment,
    effective_rank,
    hubness,
    modality_gap,
    separability,
    similarities,
    uniformity,
)
from cafe.evaluation.suite import EvaluationResult, Suite
from cafe.evaluation.suites.retrieval import FLICKR, MSCOCO, OWN, embed

HOMES = (OWN, FLICKR, MSCOCO)
BINS = np.linspace(-1, 1, 81)  # of the histogram of cosines


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Measures each collection; those of your own without the collection's name in the results'."""
    done = EvaluationResult()
    for home in HOMES:
        if not home.find(data):
            continue
        part = "geometry" if home is OWN else f"geometry/{home.name}"
        collection = home.read(data, limit)
        images, texts = embed(model, collection)
        matched, mismatched, matches, mismatches = similarities(images, texts, collection.owner, BINS)
        results = {
            "modality_gap": modality_gap(images, texts),
            "separability": separability(images, texts),
            "alignment": alignment(images[collection.owner], texts),
            "uniformity": uniformity(np.concatenate([images, texts])),
            "effective_rank_images": effective_rank(images),
            "effective_rank_texts": effective_rank(texts),
            "hubness_images": hubness(texts, images),
            "hubness_texts": hubness(images, texts),
            "matched_similarity": matched,
            "mismatched_similarity": mismatched,
        }
        histogram = {"bins": BINS.tolist(), "matched": _density(matches), "mismatched": _density(mismatches)}
        done.add(
            EvaluationResult(
                {f"{part}/{name}": value for name, value in results.items()}, samples={"histogram": histogram}
            )
        )
    return done


def _density(counts: np.ndarray) -> list[float]:
    """Counts as a density over `BINS`."""
    density: list[float] = (counts / (max(1, counts.sum()) * np.diff(BINS))).tolist()
    return density


def find(data: Path) -> list[Path]:
    """The files of the collections that are there."""
    return [path for home in HOMES for path in home.find(data)]


GEOMETRY = Suite(
    name="geometry",
    measures="modality gap and separability, alignment, uniformity, effective rank and hubness of a collection",
    files=("what retrieval, flickr30k or coco expect",),
    download="as for those",
    sources=(
        "arXiv 2203.02053 (modality gap)",
        "arXiv 2005.10242 (alignment, uniformity)",
        "Roy & Vetterli, EUSIPCO 2007 (effective rank)",
        "Radovanović et al., JMLR 11, 2010 (hubness)",
    ),
    find_files=find,
    run=run,
)
