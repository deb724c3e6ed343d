"""Search a collection: by vectors, exactly or by an index, and by words; fused where a query is words."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

from cafe.index.calibration import apply_logistic
from cafe.index.filters import Predicate
from cafe.index.fusion import fuse_ranks
from cafe.index.manifest import Calibration, VectorIndex
from cafe.index.query import Query
from cafe.index.snapshot import PlaceOfImage, Snapshot

Sort = Literal["score", "newest", "oldest", "name"]
Numbers = Int64[np.ndarray, " _images"]
MIN_RANKED = 200  # images of each ranking that are fused
MAX_COMPARED = 1000  # images that filters leave of a large collection and that are compared without its vector index
MAX_WORD_MATCHES = 10_000  # images in which words are looked for, before filters
MIN_RELEVANCE = 0.5  # of the most relevant image's: in IMG_3551, the number counts and not what all names have


@dataclass(frozen=True)
class Hit:
    """Hold an image that a search found.

    Attributes:
        score: how well it matches, from 0 to 1 in a calibrated collection, see `cafe.index.calibration`.
        similarity: the cosine similarity of its embedding and the query's.
        path: the file it is in.
        page: the number of the page, from 1; None for an image.
        caption: what the model says about it; None if it was not asked.
        text: the words on a page, or those that came with a record.
        taken_at: when it was taken, by its EXIF data, or else when its file was changed; in local time.
        width, height: in pixels.
        columns: what came along with a record.
        key: of its content.
        id: of its place: the path, with the page.
    """

    score: float
    similarity: float
    path: str
    page: int | None
    caption: str | None
    text: str
    taken_at: datetime
    width: int
    height: int
    columns: dict[str, Any]
    key: str
    id: str


def search(
    snapshot: Snapshot,
    query: Query,
    vector: Float32[np.ndarray, " dim"],
    k: int,
    predicate: Predicate,
    min_score: float | None,
    calibration: Calibration | None,
    vector_index: VectorIndex | None,
) -> list[Hit]:
    """Return the best images for a query, the best first.

    Args:
        snapshot: the collection.
        query: what is searched for.
        vector: its embedding.
        k: the most images to return.
        predicate: which images may be returned.
        min_score: the least score of an image; None for any.
        calibration: how similarities become scores.
        vector_index: the index of a large collection.
    """
    # Filters before the search, so that k images are found wherever there are as many.
    allowed = snapshot.allowed(predicate)
    rankings = _rankings(snapshot, query, vector, k, allowed, vector_index)
    numbers = np.unique(np.concatenate(rankings))
    similarities = snapshot.vectors_of(numbers) @ vector
    # By fused rank; equal ones by similarity.
    fused = fuse_ranks(rankings, len(snapshot))[numbers]
    order = np.lexsort((-similarities, -fused))
    curve = None
    if calibration is not None:
        curve = calibration.words if query.has_words else calibration.images
    scores = apply_logistic(curve, similarities)
    hits: list[Hit] = []
    for row in order.tolist():
        if len(hits) == k:
            break
        if min_score is None or scores[row] >= min_score:
            number = int(numbers[row])
            place = snapshot.place_of(number, predicate)
            hits.append(make_hit(snapshot, number, place, float(similarities[row]), float(scores[row])))
    return hits


def sort_hits(hits: Sequence[Hit], sort: Sort) -> list[Hit]:
    """Return hits in another order than by how well they match."""
    match sort:
        case "newest":
            return sorted(hits, key=lambda hit: hit.taken_at, reverse=True)
        case "oldest":
            return sorted(hits, key=lambda hit: hit.taken_at)
        case "name":
            return sorted(hits, key=lambda hit: (hit.path, hit.page or 0))
        case _:
            return list(hits)


def make_hit(snapshot: Snapshot, number: int, place: PlaceOfImage, similarity: float, score: float) -> Hit:
    """Return what is known about an image that was found at a place."""
    image = snapshot.images.slice(number, 1).to_pylist()[0]
    return Hit(
        score=score,
        similarity=similarity,
        path=place.path,
        page=place.page,
        caption=image["caption"],
        text=image["text"],
        taken_at=snapshot.taken_at(number, place),
        width=image["width"],
        height=image["height"],
        columns=json.loads(place.columns) if place.columns else {},
        key=image["key"],
        id=place.id,
    )


def _rankings(
    snapshot: Snapshot,
    query: Query,
    vector: Float32[np.ndarray, " dim"],
    k: int,
    allowed: Bool[np.ndarray, " images"] | None,
    vector_index: VectorIndex | None,
) -> list[Numbers]:
    """Rank images by their vectors and, where the query is words, by captions, texts and names."""
    count = max(MIN_RANKED, 2 * k)
    rankings = [_nearest_images(snapshot, vector, count, allowed, vector_index)]
    if not query.words:
        return rankings
    if snapshot.is_exact:
        vectors, numbers = snapshot.caption_vectors
        if allowed is not None:
            vectors, numbers = vectors[allowed[numbers]], numbers[allowed[numbers]]
        rankings.append(numbers[top_rows(vectors @ vector, count)])
    for relevances in snapshot.store.search_words(query.words, MAX_WORD_MATCHES):
        rankings.append(_rank_words(snapshot, vector, relevances, allowed)[:count])
    return rankings


def _rank_words(
    snapshot: Snapshot,
    vector: Float32[np.ndarray, " dim"],
    relevances: Mapping[str, float],
    allowed: Bool[np.ndarray, " images"] | None,
) -> Numbers:
    """Rank the images in which words were found, the most relevant first; equal ones by their vectors.

    Args:
        snapshot: the collection.
        vector: the query's embedding.
        relevances: of images by their keys, the most relevant first.
        allowed: which images pass the filters.
    """
    found = {snapshot.numbers[key]: relevance for key, relevance in relevances.items() if key in snapshot.numbers}
    numbers = np.array([number for number in found if allowed is None or allowed[number]], np.int64)
    if not len(numbers):
        return numbers
    relevance = np.array([found[number] for number in numbers.tolist()])
    numbers = numbers[relevance >= MIN_RELEVANCE * relevance[0]]
    if not snapshot.is_exact:  # reading vectors takes time
        numbers = numbers[:MAX_COMPARED]
    # Many captions have the same words, so that without this their order would be as good as random.
    similarities = snapshot.vectors_of(numbers) @ vector
    return numbers[np.lexsort((-similarities, -relevance[: len(numbers)]))]


def _nearest_images(
    snapshot: Snapshot,
    vector: Float32[np.ndarray, " dim"],
    count: int,
    allowed: Bool[np.ndarray, " images"] | None,
    vector_index: VectorIndex | None,
) -> Numbers:
    """Return the images whose embeddings are nearest to a query's, the nearest first."""
    if snapshot.is_exact:
        similarities = snapshot.vectors @ vector
        if allowed is None:
            return top_rows(similarities, count)
        rows = np.flatnonzero(allowed)
        return rows[top_rows(similarities[rows], count)]
    if allowed is not None and allowed.sum() <= MAX_COMPARED:
        rows = np.flatnonzero(allowed)
        return rows[top_rows(snapshot.vectors_of(rows) @ vector, count)]
    num_probes = vector_index.num_probes if vector_index else None
    candidates = count
    while True:
        # The index reads some of its partitions alone, so the last resort is to compare all.
        is_last = candidates >= len(snapshot)
        keys = snapshot.store.nearest(vector, candidates, num_probes, exact=allowed is not None and is_last)
        found = np.array([snapshot.numbers[key] for key in keys if key in snapshot.numbers], np.int64)
        if allowed is None:
            return found
        found = found[allowed[found]]
        # More candidates, until enough of them pass the filters.
        if len(found) >= count or is_last:
            return found[:count]
        candidates *= 8


def top_rows(similarities: Float[np.ndarray, " rows"], count: int) -> Numbers:
    """Return the numbers of the largest values, the largest first; of equal ones the first."""
    if len(similarities) > count:
        largest = np.sort(np.argpartition(-similarities, count - 1)[:count])
    else:
        largest = np.arange(len(similarities))
    return largest[np.argsort(-similarities[largest], kind="stable")]
