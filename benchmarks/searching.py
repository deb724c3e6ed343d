"""Searching vectors: by the index of a large collection, and exactly in memory beside LanceDB's scan.

The vectors lie in clusters, as those of images do, and are written straight into a collection's table. Queries are near
to some of them; the truth is found by comparing them with all.

python benchmarks/searching.py [--rows 1000000] [--dim 1024] [--exact-rows 100000] [--exact-dim 512] [--json FILE]
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import Row, clock, show

from cafe.index.manifest import VectorIndex
from cafe.index.searching import top_rows
from cafe.index.snapshot import Snapshot
from cafe.index.store import ImageRow, Place, Store
from cafe.index.vector_index import build_vector_index

ROWS_PER_CLUSTER = 200
SPREAD = 0.7  # the length of the noise around a cluster's unit center
QUERY_NOISE = 0.5
NUM_QUERIES, NEIGHBORS, CHUNK = 200, 10, 10_000


class Vectors:
    """Draw unit vectors around random centers, the same chunk by chunk each time."""

    def __init__(self, rows: int, dim: int) -> None:
        self.rows, self.dim = rows, dim
        rng = np.random.default_rng(0)
        self.centers = _unit(rng.normal(size=(math.ceil(rows / ROWS_PER_CLUSTER), dim)).astype(np.float32))

    def chunk(self, start: int) -> np.ndarray:
        """Draw the vectors from a row on."""
        rng = np.random.default_rng(start + 1)
        count = min(CHUNK, self.rows - start)
        noise = _unit(rng.normal(size=(count, self.dim)).astype(np.float32))
        return _unit(self.centers[rng.integers(len(self.centers), size=count)] + SPREAD * noise)

    def queries(self) -> np.ndarray:
        """Draw queries near to some of the first vectors."""
        rng = np.random.default_rng(0)
        sample = self.chunk(0)[rng.integers(min(CHUNK, self.rows), size=NUM_QUERIES)]
        return _unit(sample + QUERY_NOISE * _unit(rng.normal(size=sample.shape).astype(np.float32)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors to length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def fill(directory: Path, vectors: Vectors) -> Store:
    """Write all vectors into a new store."""
    directory.mkdir()
    store = Store.create(directory, vectors.dim)
    for start in range(0, vectors.rows, CHUNK):
        rows = [
            ImageRow(f"{start + number:032x}", vector, None, None, "", 1, 1, None, b"")
            for number, vector in enumerate(vectors.chunk(start))
        ]
        store.write(rows, [])
    store.compact()
    return store


def p95(search: Callable[[np.ndarray], object], queries: np.ndarray) -> float:
    """Return the 95th percentile of the milliseconds of a search, after some that are not counted."""
    for query in queries[:10]:
        search(query)
    return 1000 * float(np.percentile([clock(lambda: search(query)) for query in queries], 95))  # noqa: B023


def large(directory: Path, vectors: Vectors) -> list[Row]:
    """Measure the index: recall, the time of a query and of building it, and the bytes on disk."""
    started = time.perf_counter()
    store = fill(directory, vectors)
    print(f"{vectors.rows:,} x {vectors.dim} vectors written in {time.perf_counter() - started:.0f} s", flush=True)
    built: list[VectorIndex] = []
    seconds = clock(lambda: built.append(build_vector_index(store, vectors.rows)))
    [index] = built
    queries = vectors.queries()
    recalls = []
    for query, truth in zip(queries, store.nearest_of_all(queries, NEIGHBORS), strict=True):
        recalls.append(len({*truth} & {*store.nearest(query, NEIGHBORS, index.num_probes)}) / NEIGHBORS)
    milliseconds = p95(lambda query: store.nearest(query, NEIGHBORS, index.num_probes), queries)
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    print(
        f"index built in {seconds:.0f} s, with its recall measured as {index.recall:.3f} at {index.num_probes} "
        f"partitions a query; p95 of {milliseconds:.1f} ms; {size / 1e9:.2f} GB on disk, the vectors in half precision "
        f"are {2 * vectors.rows * vectors.dim / 1e9:.2f} GB"
    )
    return [Row(f"{vectors.rows:,} x {vectors.dim}: recall@{NEIGHBORS}", float(np.mean(recalls)), 0.95, 0.98)]


def exact(directory: Path, vectors: Vectors) -> list[Row]:
    """Compare an exact search in memory, as small collections have it, with LanceDB's scan."""
    store = fill(directory, vectors)
    for start in range(0, vectors.rows, CHUNK):
        keys = [f"{number:032x}" for number in range(start, min(start + CHUNK, vectors.rows))]
        store.write([], [Place(key, f"/{key}.jpg", None, key, "/", 1, 1, key) for key in keys])
    queries = vectors.queries()
    snapshot = Snapshot.read(store)
    names = snapshot.images["key"].to_pylist()

    def search(query: np.ndarray) -> list[str]:
        """Search in memory, as `cafe.index.searching` does."""
        return [names[number] for number in top_rows(snapshot.vectors @ query, NEIGHBORS).tolist()]

    def scan(query: np.ndarray) -> list[str]:
        """Search by LanceDB, without an index."""
        return store.nearest(query, NEIGHBORS, exact=True)

    agreement = np.mean([len({*search(query)} & {*scan(query)}) / NEIGHBORS for query in queries[:50]])
    memory, scanned = p95(search, queries), p95(scan, queries)
    print(f"p95: {memory:.1f} ms in memory, {scanned:.1f} ms by a scan; they agree in {agreement:.1%} of the hits")
    assert snapshot.is_exact and agreement > 0.99
    name = f"{vectors.rows:,} x {vectors.dim}: p95, in memory / LanceDB's scan"
    return [Row(name, memory / scanned, 0.25, 0.25, at_least=False)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--exact-rows", type=int, default=100_000)
    parser.add_argument("--exact-dim", type=int, default=512)
    options, _ = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = exact(Path(directory, "exact"), Vectors(options.exact_rows, options.exact_dim))
        rows += large(Path(directory, "large"), Vectors(options.rows, options.dim))
    show("Searching vectors", rows)


if __name__ == "__main__":
    main()
