"""The index of a large collection's vectors, and how much of the truth it finds."""

import math

import numpy as np
from jaxtyping import Float32

from cafe.index.manifest import VectorIndex
from cafe.index.store import Store

NUM_QUERIES = 100  # on which recall is measured
NEIGHBORS = 10
MIN_RECALL = 0.98  # on average over these queries; more partitions are read until it is reached
NUM_PROBES = (8, 16, 32, 64, 128, 256)
ROWS_PER_PARTITION = 1024
GROWTH = 2  # a collection that has grown so much is indexed anew


def needs_vector_index(index: VectorIndex | None, num_images: int, max_exact: int) -> bool:
    """Return whether the vectors of a collection are to be indexed: for the first time, or because it has grown."""
    if num_images <= max_exact:
        return False
    return index is None or num_images >= GROWTH * index.num_images


def build_vector_index(store: Store, num_images: int) -> VectorIndex:
    """Build the index, and choose how many of its partitions a search reads by the recall that this gives."""
    store.index_vectors(max(1, math.ceil(num_images / ROWS_PER_PARTITION)))
    queries = sample_queries(store)
    truth = [set(keys) for keys in store.nearest_of_all(queries, NEIGHBORS)]
    # As few partitions as give the recall: reading twice as many takes about twice the time.
    recall = 0.0
    for num_probes in NUM_PROBES:
        found = [set(store.nearest(query, NEIGHBORS, num_probes)) for query in queries]
        recall = float(np.mean([len(one & other) / len(other) for one, other in zip(found, truth, strict=True)]))
        if recall >= MIN_RECALL:
            break
    return VectorIndex(num_images, num_probes, recall)


def sample_queries(store: Store) -> Float32[np.ndarray, "queries dim"]:
    """Return vectors near to some of the collection's, as queries are."""
    # Noise half as long as the vectors: images themselves would all be found in their own partitions.
    rng = np.random.default_rng(0)
    sample = store.read_sample_vectors(NUM_QUERIES)
    noise = rng.normal(size=sample.shape).astype(np.float32)
    noise *= 0.5 / np.linalg.norm(noise, axis=1, keepdims=True)
    queries = sample + noise
    unit: Float32[np.ndarray, "queries dim"] = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    return unit
