"""Retrieval: images find their captions and captions find their image, among all of a dataset.

A query's rank is the number of wrong candidates before its best right one, plus 1; ties count against the model. R@k is
the fraction of queries whose rank is at most k: an image finds any of its captions, a caption its one image.

Where two images have an equal caption, the literature counts it against the model: one of them is wrong, although
nothing tells which. `unique_R@k` counts equal captions once, as MMEB counts equal candidates: an image finds any of its
texts among distinct ones, a caption any image that has it. It is reported where a dataset has such captions.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cafe.content import ImageRef
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.io import NUM_SAMPLES, evenly_spaced, sample_image
from cafe.evaluation.metrics import ranks, ranks_of_pairs
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate
from cafe.evaluation.suites.captioned_images import (
    COCO_DATASET,
    FLICKR30K_DATASET,
    PARAGRAPHS_DATASET,
    USER_DATASET,
    CaptionedImages,
    RetrievalDataset,
)
from cafe.images.decoding import decode_image
from cafe.images.thumbnails import thumbnail

KS = (1, 5, 10)
NUM_HITS = 5  # of a sample query, for the report
MAP_IMAGES, MAP_TEXTS = 500, 1000  # embeddings kept for the report's map


def run(dataset: RetrievalDataset, model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Measure both directions; `limit` images with their captions make a smaller and easier dataset."""
    captioned = dataset.read(data, limit)
    # An image and its captions form a group; whatever is in the query's group is right.
    owner, numbers = captioned.owner, np.arange(len(captioned.names))
    images, texts = embed(model, captioned)
    result = EvaluationResult(
        samples=_samples(data, captioned, images, texts),
        embeddings={"images": images[:MAP_IMAGES], "texts": texts[:MAP_TEXTS], "owner": owner[:MAP_TEXTS]},
    )
    unique = _unique_ranks(captioned, images, texts)
    # In the other direction, queries and candidates change places.
    for direction, rank in (
        ("image_to_text", ranks(images, texts, numbers, owner)),
        ("text_to_image", ranks(texts, images, owner, numbers)),
    ):
        part = f"{dataset.name}/{direction}"
        rows = _output_rows(captioned, part, rank, unique.get(direction))
        result.outputs[part] = rows
        result.results |= aggregate(rows)
        # Ranks are counted from 1 in results, from 0 in `metrics`.
        result.results[f"{part}/median_rank"] = float(np.median(rank) + 1)
        result.results[f"{part}/mean_rank"] = float(np.mean(rank) + 1)
    return result


def _unique_ranks(
    captioned: CaptionedImages, images: Float[np.ndarray, "images dim"], texts: Float[np.ndarray, "texts dim"]
) -> dict[str, Int[np.ndarray, " queries"]]:
    """Rank with equal captions counted once, by direction; nothing if no two images have an equal caption."""
    first = {text: number for number, text in reversed(list(enumerate(captioned.texts)))}
    column = {text: number for number, text in enumerate(first)}
    text_of = np.array([column[text] for text in captioned.texts])
    # Which image has which text, each pair once.
    pairs = np.unique(np.stack([captioned.owner, text_of], axis=1), axis=0)
    if len(pairs) == len(first):
        return {}
    owners: dict[int, list[int]] = {}
    for image, text in pairs.tolist():
        owners.setdefault(text, []).append(image)
    queries = [(number, image) for number, text in enumerate(text_of.tolist()) for image in owners[text]]
    return {
        "image_to_text": ranks_of_pairs(images, texts[list(first.values())], pairs),
        "text_to_image": ranks_of_pairs(texts, images, np.array(queries)),
    }


def _output_rows(
    captioned: CaptionedImages,
    part: str,
    rank: Int[np.ndarray, " queries"],
    unique_rank: Int[np.ndarray, " queries"] | None,
) -> list[dict[str, Any]]:
    """Make the output row of each query of one direction.

    Args:
        captioned: the images and captions.
        part: names the direction.
        rank: of each query's match, from 0.
        unique_rank: the same with equal captions counted once; None if there are none.
    """
    rows = []
    for number, value in enumerate(rank):
        # The captions of one image are resampled together.
        if part.endswith("/image_to_text"):
            group = captioned.names[number]
            query = {"image": group}
        else:
            group = captioned.names[captioned.owner[number]]
            query = {"text": captioned.texts[number]}
        marks = {f"{part}/R@{k}": int(value < k) for k in KS}
        if unique_rank is not None:
            marks |= {f"{part}/unique_R@{k}": int(unique_rank[number] < k) for k in KS}
        rows.append({"id": number, "group": group, **query, "rank": int(value) + 1, "marks": marks})
    return rows


def embed(
    model: CachedModel, captioned: CaptionedImages
) -> tuple[Float[np.ndarray, "images dim"], Float[np.ndarray, "texts dim"]]:
    """Embed both sides as unit rows."""
    return model.embed(captioned.images), model.embed(captioned.texts)


def _samples(
    data: Path,
    captioned: CaptionedImages,
    images: Float[np.ndarray, "images dim"],
    texts: Float[np.ndarray, "texts dim"],
) -> dict[str, Any]:
    """Take some queries in both directions with their first hits, for the report."""
    text_numbers = evenly_spaced(len(texts), NUM_SAMPLES)
    image_numbers = evenly_spaced(len(images), NUM_SAMPLES // 2)
    # All queries of a direction in one product.
    text_queries = []
    for query, nearest in zip(text_numbers, _nearest(texts[text_numbers], images), strict=True):
        hits = [_image_hit(data, captioned, query, hit) for hit in nearest]
        text_queries.append({"text": captioned.texts[query], "hits": hits})
    image_queries = []
    for query, nearest in zip(image_numbers, _nearest(images[image_numbers], texts), strict=True):
        hits = [{"text": captioned.texts[hit], "right": bool(captioned.owner[hit] == query)} for hit in nearest]
        image_queries.append({"image": _display_image(data, captioned.images[query]), "hits": hits})
    return {"text_queries": text_queries, "image_queries": image_queries}


def _nearest(
    queries: Float[np.ndarray, "queries dim"], candidates: Float[np.ndarray, "candidates dim"]
) -> Int[np.ndarray, "queries hits"]:
    """Find the candidates most similar to each query, best first."""
    # Where scores are equal, a stable sort gives the same hits on every machine.
    return np.argsort(-(queries @ candidates.T), axis=1, kind="stable")[:, :NUM_HITS]


def _image_hit(data: Path, captioned: CaptionedImages, text: int, image: int) -> dict[str, Any]:
    """Show an image that a caption found, and whether it is the caption's own."""
    is_right = bool(captioned.owner[text] == image)
    return {"image": _display_image(data, captioned.images[image]), "right": is_right}


def _display_image(data: Path, image: Path | ImageRef) -> str:
    """Name an image for the report; one that is not a file in the folder is shown by a thumbnail."""
    if isinstance(image, ImageRef):
        return thumbnail(decode_image(image))
    # As annotations name it: it was joined with the folder, which may be a relative path.
    return sample_image(image.relative_to(data) if image.is_relative_to(data) else image, data)


def _retrieval_suite(
    dataset: RetrievalDataset,
    labels: tuple[str, str],
    measures: str,
    files: tuple[str, ...],
    download: str,
    *sources: str,
) -> Suite:
    """Declare the suite of a dataset; all measure the same, on different files.

    Args:
        dataset: names the suite and finds its files.
        labels: what the report calls its two headline results, texts that find images first.
        measures: see `Suite`, as the arguments that follow.
        files: what it expects.
        download: where to download that.
        sources: the published protocol.
    """
    headline = (f"{dataset.name}/text_to_image/R@1", f"{dataset.name}/image_to_text/R@1")
    return Suite(
        name=dataset.name,
        measures=measures,
        files=files,
        download=download,
        sources=sources,
        find_files=dataset.find,
        run=partial(run, dataset),
        headline=headline,
        retrieval=headline,
        lower_is_better=(f"{dataset.name}/*/median_rank", f"{dataset.name}/*/mean_rank"),
        labels=dict(zip(headline, labels, strict=True)),
    )


RETRIEVAL = _retrieval_suite(
    USER_DATASET,
    ("Text finds image, R@1", "Image finds text, R@1"),
    "images find their captions and captions their image, in a dataset of your own",
    (
        "dataset_*.json (Karpathy, its split 'test'), or captions.csv, .jsonl or .parquet (columns image, caption)",
        "its images, in the folder itself or in images/",
    ),
    "your own images with captions; written by `cafe scenes write DIR`",
)
FLICKR30K = _retrieval_suite(
    FLICKR30K_DATASET,
    ("Flickr30K, text finds image, R@1", "Flickr30K, image finds text, R@1"),
    "zero-shot retrieval on Flickr30K's 1,000 test images, the first 5 captions each",
    (
        "[flickr30k/]dataset_flickr30k.json (Karpathy) and its images, in flickr30k-images/ or images/",
        "or flickr30k/: the CSV file and images_flickr_1k_test/, parquet files, or the output of save_to_disk",
    ),
    "cs.stanford.edu/people/karpathy/deepimagesent and shannon.cs.illinois.edu/DenotationGraph; "
    "or the Hub dataset nlphuji/flickr_1k_test_image_text_retrieval",
    "arXiv 1412.2306 (split)",
    "arXiv 2503.19900",
)
COCO = _retrieval_suite(
    COCO_DATASET,
    ("COCO, text finds image, R@1", "COCO, image finds text, R@1"),
    "zero-shot retrieval on the 5,000 test images of Karpathy's COCO split, the first 5 captions each",
    (
        "[coco/]dataset_coco.json (Karpathy) and COCO's val2014 images, in val2014/ or images/",
        "or coco/: the CSV file and images_mscoco_2014_5k_test/, parquet files, or the output of save_to_disk",
    ),
    "cs.stanford.edu/people/karpathy/deepimagesent and cocodataset.org (2014 Val images); "
    "or the Hub dataset nlphuji/mscoco_2014_5k_test_image_text_retrieval",
    "arXiv 1412.2306 (split)",
    "arXiv 2503.19900",
)
PARAGRAPHS = _retrieval_suite(
    PARAGRAPHS_DATASET,
    ("Paragraph finds image, R@1", "Image finds paragraph, R@1"),
    "retrieval with captions of several sentences, which short-text encoders truncate",
    (
        "paragraphs*.csv, .jsonl or .parquet (columns image, caption)",
        "its images, in the folder itself or in images/",
    ),
    "DOCCI, DCI, Urban1k and others, with their files renamed; written by `cafe scenes write DIR`",
    "arXiv 2403.15378 (Urban1k)",
    "arXiv 2404.19753 (DOCCI)",
    "arXiv 2312.08578 (DCI)",
)
