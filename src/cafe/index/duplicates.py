"""Find images that look the same: copies, and what was resized, compressed or retouched."""

import numpy as np
from jaxtyping import Int64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cafe.images.appearance import appearance_distance
from cafe.index.searching import Hit, make_hit
from cafe.index.snapshot import Snapshot
from cafe.search import search

MIN_SIMILARITY = 0.95  # of embeddings
MAX_DISTANCE = 6.0  # between appearances: embeddings alone find what shows the same, and need not look the same
NEIGHBORS = 32  # that an image is compared with
PAIRS_AT_ONCE = 65_536


def find_duplicates(snapshot: Snapshot, min_similarity: float = MIN_SIMILARITY) -> list[list[Hit]]:
    """Return groups of places whose images look the same, the largest groups first.

    Two images belong together if their embeddings are similar and their colors nearly equal.

    Args:
        snapshot: the collection.
        min_similarity: the least cosine similarity of two images.
    """
    if not len(snapshot):
        return []
    # Images that are connected by others belong together: a copy of a copy.
    labels = _connect(snapshot, min_similarity)
    members: dict[int, list[int]] = {}
    for number, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(number)
    groups = [_hits_of(snapshot, numbers) for numbers in members.values()]
    return sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), group[0].id))


def _connect(snapshot: Snapshot, min_similarity: float) -> Int64[np.ndarray, " images"]:
    """Return the number of the group of each image."""
    similarities, neighbors = search(snapshot.vectors, snapshot.vectors, min(NEIGHBORS, len(snapshot)))
    rows, places = np.nonzero(similarities >= min_similarity)
    columns = neighbors[rows, places]
    appearances = snapshot.appearances
    alike = np.empty(len(rows), bool)
    for start in range(0, len(rows), PAIRS_AT_ONCE):
        pairs = slice(start, start + PAIRS_AT_ONCE)
        alike[pairs] = appearance_distance(appearances[rows[pairs]], appearances[columns[pairs]]) <= MAX_DISTANCE
    edges = (np.ones(alike.sum()), (rows[alike], columns[alike]))
    graph = coo_array(edges, shape=(len(snapshot), len(snapshot)))
    labels: Int64[np.ndarray, " images"] = connected_components(graph, directed=False)[1].astype(np.int64)
    return labels


def _hits_of(snapshot: Snapshot, numbers: list[int]) -> list[Hit]:
    """Return all places of some images; their similarity is that with the first image."""
    # An image may be at several places, which are copies.
    vectors = snapshot.vectors[numbers]
    hits = []
    for number, similarity in zip(numbers, (vectors @ vectors[0]).tolist(), strict=True):
        for place in snapshot.places[number]:
            hits.append(make_hit(snapshot, number, place, similarity, similarity))
    return hits
