"""Retrieval: pictures find their captions and captions find their picture, among all of a collection.

A query's rank is the number of wrong candidates before its best right one, plus 1; ties count against the model. R@k is
the share of queries whose rank is at most k: a picture finds any of its captions, a caption its one picture.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cafe.errors import CafeError
from cafe.evaluation.metrics import ranks
from cafe.evaluation.subject import Subject
from cafe.evaluation.suite import KEPT, Evaluation, Suite, find_picture, only, rates, spread

KS = (1, 5, 10)
KEPT_HITS = 5
PROTOCOL = 5  # captions of a picture that the 5K/25K protocol of Flickr30K and COCO takes, the first ones
NAMED = ("dataset_flickr30k.json", "dataset_coco.json")


@dataclass(frozen=True)
class Collection:
    """Pictures and captions.

    Attributes:
        pictures: relative to the folder of evaluation files.
        texts: the captions, picture by picture.
        owner: for each caption, the number of its picture.
    """

    pictures: list[Path]
    texts: list[str]
    owner: Int[np.ndarray, "texts"]


@dataclass(frozen=True)
class Embedded:
    """A collection's embeddings: unit rows."""

    images: Float[np.ndarray, "pictures dim"]
    texts: Float[np.ndarray, "texts dim"]


def embed(model: Subject, data: Path, collection: Collection) -> Embedded:
    """Embeds both sides, pictures first."""
    images = model.embed([data / picture for picture in collection.pictures])
    return Embedded(images, model.embed(collection.texts))


def run(name: str, find: Callable[[Path], list[Path]], model: Subject, data: Path, limit: int | None) -> Evaluation:
    """Measures both ways; `limit` pictures with their captions make a smaller and easier collection."""
    collection = read(data, find(data)[0], limit, None if name in ("retrieval", "paragraphs") else PROTOCOL)
    pictures, texts, owner = collection.pictures, collection.texts, collection.owner
    embedded = embed(model, data, collection)
    numbers = np.arange(len(pictures))
    ways = {
        "image_to_text": ranks(embedded.images, embedded.texts, numbers, owner),
        "text_to_image": ranks(embedded.texts, embedded.images, owner, numbers),
    }
    mapped = {"images": embedded.images[:500], "texts": embedded.texts[:1000], "owner": owner[:1000]}
    done = Evaluation(samples=_samples(collection, embedded), embeddings=mapped)
    for way, rank in ways.items():
        group = numbers if way == "image_to_text" else owner
        rows = [
            {
                "id": number,
                "group": str(pictures[group[number]]),
                **({"image": str(pictures[number])} if way == "image_to_text" else {"text": texts[number]}),
                "rank": int(place) + 1,
                "marks": {f"{name}/{way}/R@{k}": int(place < k) for k in KS},
            }
            for number, place in enumerate(rank)
        ]
        done.outputs[f"{name}/{way}"] = rows
        done.results |= rates(rows)
        done.results[f"{name}/{way}/median_rank"] = float(np.median(rank) + 1)
        done.results[f"{name}/{way}/mean_rank"] = float(np.mean(rank) + 1)
    return done


def _samples(collection: Collection, embedded: Embedded) -> dict[str, Any]:
    pictures, texts, owner = collection.pictures, collection.texts, collection.owner
    asking, showing = spread(len(texts), KEPT), spread(len(pictures), KEPT // 2)
    found = _top(embedded.texts[asking] @ embedded.images.T)
    said = _top(embedded.images[showing] @ embedded.texts.T)
    return {
        "text_queries": [
            {
                "text": texts[query],
                "hits": [{"image": str(pictures[hit]), "right": bool(owner[query] == hit)} for hit in hits],
            }
            for query, hits in zip(asking, found, strict=True)
        ],
        "image_queries": [
            {
                "image": str(pictures[query]),
                "hits": [{"text": texts[hit], "right": bool(owner[hit] == query)} for hit in hits],
            }
            for query, hits in zip(showing, said, strict=True)
        ],
    }


def _top(scores: Float[np.ndarray, "queries candidates"]) -> Int[np.ndarray, "queries hits"]:
    return np.argsort(-scores, axis=1, kind="stable")[:, :KEPT_HITS]


def read(data: Path, path: Path, limit: int | None, captions: int | None) -> Collection:
    """The collection of a file: its first `limit` pictures, the first `captions` captions of each; all if None.

    Raises:
        CafeError: the file is not of its format, or a picture is not there.
    """
    rows = _karpathy_test(path)[:limit]
    pictures = [
        find_picture(Path(row.get("filepath", "")) / row["filename"], data, path, "flickr30k-images") for row in rows
    ]
    kept = [[sentence["raw"] for sentence in row["sentences"]][:captions] for row in rows]
    owner = np.array([index for index, texts in enumerate(kept) for _ in texts])
    return Collection(pictures, [text for texts in kept for text in texts], owner)


def _karpathy_test(path: Path) -> list[dict[str, Any]]:
    """The complete records of a Karpathy file's split "test"."""
    try:
        rows = [row for row in json.loads(path.read_text())["images"] if row["split"] == "test"]
        complete = all(row["filename"] and row["sentences"][0]["raw"] for row in rows)
    except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise CafeError(f"The evaluation file {path} is not a Karpathy file: {error!r}.") from None
    if not rows or not complete:
        raise CafeError(f"The evaluation file {path} has no complete image in its split 'test'.")
    return rows


def find_retrieval(data: Path) -> list[Path]:
    """A Karpathy file that is not a named suite's."""
    path = only(data, "dataset_*.json", but=NAMED)
    return [path] if path else []


def _find(*patterns: str) -> Callable[[Path], list[Path]]:
    def find(data: Path) -> list[Path]:
        path = only(data, *patterns)
        return [path] if path else []

    return find


find_flickr30k = _find("dataset_flickr30k.json", "flickr30k/dataset_flickr30k.json")
find_coco = _find("dataset_coco.json", "coco/dataset_coco.json")

RETRIEVAL = Suite(
    name="retrieval",
    measures="pictures find their captions and captions their picture, in a collection of your own",
    files=("dataset_*.json: a Karpathy file, its split 'test'", "its pictures, in the folder itself or in images/"),
    where="your own pictures with captions; written by `cafe scenes write DIR`",
    find=find_retrieval,
    run=partial(run, "retrieval", find_retrieval),
)

FLICKR30K = Suite(
    name="flickr30k",
    measures="zero-shot retrieval on Flickr30K's 1,000 test pictures, 5 captions each",
    files=(
        "[flickr30k/]dataset_flickr30k.json: the Karpathy file",
        "its pictures, in the folder itself, images/ or flickr30k-images/",
    ),
    where="cs.stanford.edu/people/karpathy/deepimagesent (file); shannon.cs.illinois.edu/DenotationGraph (pictures)",
    sources=("arXiv 1412.2306 (split)", "arXiv 2503.19900"),
    find=find_flickr30k,
    run=partial(run, "flickr30k", find_flickr30k),
)

COCO = Suite(
    name="coco",
    measures="zero-shot retrieval on COCO's 5,000 test pictures of Karpathy's split, the first 5 captions each",
    files=(
        "[coco/]dataset_coco.json: the Karpathy file",
        "COCO's val2014 pictures, in the folder itself, images/ or val2014/",
    ),
    where="cs.stanford.edu/people/karpathy/deepimagesent (captions); cocodataset.org (2014 Val images)",
    sources=("arXiv 1412.2306 (split)", "arXiv 2503.19900"),
    find=find_coco,
    run=partial(run, "coco", find_coco),
)
