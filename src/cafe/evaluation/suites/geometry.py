"""How images and texts are distributed in the embedding space, for every dataset that retrieval measures."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

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
from cafe.evaluation.suites.captioned_images import COCO_DATASET, FLICKR30K_DATASET, USER_DATASET
from cafe.evaluation.suites.retrieval import embed

DATASETS = (USER_DATASET, FLICKR30K_DATASET, COCO_DATASET)
BINS = np.linspace(-1, 1, 81)  # of the histogram of cosines


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Measure each dataset; the results of your own do not have the dataset's name in theirs."""
    result = EvaluationResult()
    for dataset in DATASETS:
        if not dataset.find(data):
            continue
        captioned = dataset.read(data, limit)
        # If retrieval ran before, the cache has these embeddings.
        images, texts = embed(model, captioned)
        part = "geometry" if dataset is USER_DATASET else f"geometry/{dataset.name}"
        result.add(measure(images, texts, captioned.owner, part))
    return result


def measure(
    images: Float[np.ndarray, "images dim"],
    texts: Float[np.ndarray, "texts dim"],
    owner: Int[np.ndarray, " texts"],
    part: str,
) -> EvaluationResult:
    """Compute every metric of one dataset's embeddings, and the histogram of cosines for the report."""
    matched, mismatched, matched_counts, mismatched_counts = similarities(images, texts, owner, BINS)
    # Alignment is over matching pairs, so an image comes once for each of its captions.
    results = {
        "modality_gap": modality_gap(images, texts),
        "separability": separability(images, texts),
        "alignment": alignment(images[owner], texts),
        "uniformity": uniformity(np.concatenate([images, texts])),
        "effective_rank_images": effective_rank(images),
        "effective_rank_texts": effective_rank(texts),
        # Hubs are among the candidates, which the other side searches.
        "hubness_images": hubness(texts, images),
        "hubness_texts": hubness(images, texts),
        "matched_similarity": matched,
        "mismatched_similarity": mismatched,
    }
    histogram = {
        "bins": BINS.tolist(),
        "matched": _density(matched_counts),
        "mismatched": _density(mismatched_counts),
    }
    return EvaluationResult(
        {f"{part}/{name}": value for name, value in results.items()}, samples={"histogram": histogram}
    )


def _density(counts: np.ndarray) -> list[float]:
    """Turn counts into a density over `BINS`."""
    # Without any pair, all counts are 0, and so is the density.
    total = max(1, counts.sum())
    density: list[float] = (counts / (total * np.diff(BINS))).tolist()
    return density


def find(data: Path) -> list[Path]:
    """Find the files of the datasets that are there."""
    paths = []
    for dataset in DATASETS:
        paths += dataset.find(data)
    return paths


GEOMETRY = Suite(
    name="geometry",
    measures="modality gap and separability, alignment, uniformity, effective rank and hubness of a dataset",
    files=("the files of retrieval, flickr30k or coco",),
    download="see there",
    sources=(
        "arXiv 2203.02053 (modality gap)",
        "arXiv 2005.10242 (alignment, uniformity)",
        "Roy & Vetterli, EUSIPCO 2007 (effective rank)",
        "Radovanović et al., JMLR 11, 2010 (hubness)",
    ),
    find_files=find,
    run=run,
    headline=("geometry/modality_gap",),
    lower_is_better=("geometry/*modality_gap", "geometry/*separability", "geometry/*alignment", "geometry/*uniformity"),
    no_direction=("geometry/*hubness_*", "geometry/*matched_similarity"),  # "mismatched_similarity" matches too
    labels={"geometry/modality_gap": "Modality gap"},
    in_percent=False,
)
