"""Exact nearest neighbors by inner product, in blocks or by FAISS."""

from importlib.util import find_spec

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64


def search(
    queries: Float[np.ndarray, "queries dim"], corpus: Float[np.ndarray, "corpus dim"], top: int
) -> tuple[Float32[np.ndarray, "queries top"], Int64[np.ndarray, "queries top"]]:
    """The largest inner products of each query with a corpus, and where they are: exact, the largest first.

    FAISS searches where it is installed; else PyTorch does, in blocks, on a GPU where there is one.
    """
    if find_spec("faiss"):
        import faiss

        index = faiss.IndexFlatIP(corpus.shape[1])
        index.add(np.ascontiguousarray(corpus, np.float32))
        scores, places = index.search(np.ascontiguousarray(queries, np.float32), top)
        return scores, places
    return search_blocks(queries, corpus, top)


def search_blocks(
    queries: Float[np.ndarray, "queries dim"], corpus: Float[np.ndarray, "corpus dim"], top: int, block: int = 4096
) -> tuple[Float32[np.ndarray, "queries top"], Int64[np.ndarray, "queries top"]]:
    """`search` without FAISS: some queries and some of the corpus at a time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    done = []
    for start in range(0, len(queries), block):
        rows = torch.from_numpy(queries[start : start + block]).to(device)
        best = rows.new_empty(len(rows), 0)
        where = torch.empty(len(rows), 0, dtype=torch.long, device=device)
        for offset in range(0, len(corpus), block):
            scores = rows @ torch.from_numpy(corpus[offset : offset + block]).to(device).T
            places = torch.arange(offset, offset + scores.shape[1], device=device).expand_as(scores)
            best, where = torch.cat([best, scores], dim=1), torch.cat([where, places], dim=1)
            best, order = best.topk(min(top, best.shape[1]), dim=1)
            where = where.gather(1, order)
        done.append((best.cpu().numpy(), where.cpu().numpy()))
    return np.concatenate([scores for scores, _ in done]), np.concatenate([places for _, places in done])
