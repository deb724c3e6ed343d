"""Exact nearest neighbors by inner product, in blocks or by FAISS."""

from importlib.util import find_spec

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64


def search(
    queries: Float[np.ndarray, "queries dim"], corpus: Float[np.ndarray, "corpus dim"], top: int
) -> tuple[Float32[np.ndarray, "queries top"], Int64[np.ndarray, "queries top"]]:
    """Return the largest inner products of each query with a corpus, the largest first, and their indices.

    The search is exact. It is done by FAISS if that is installed; otherwise by PyTorch in blocks, on a GPU if there is
    one.
    """
    if find_spec("faiss"):
        import faiss  # an optional dependency

        index = faiss.IndexFlatIP(corpus.shape[1])
        index.add(np.ascontiguousarray(corpus, np.float32))
        scores, indices = index.search(np.ascontiguousarray(queries, np.float32), top)
        return scores, indices
    return search_blocks(queries, corpus, top)


def search_blocks(
    queries: Float[np.ndarray, "queries dim"], corpus: Float[np.ndarray, "corpus dim"], top: int, block: int = 4096
) -> tuple[Float32[np.ndarray, "queries top"], Int64[np.ndarray, "queries top"]]:
    """Search as `search` does, without FAISS: `block` queries and `block` rows of the corpus at a time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for start in range(0, len(queries), block):
        # No columns yet: each block of the corpus adds its own.
        rows = torch.from_numpy(queries[start : start + block]).to(device)
        best_scores = rows.new_empty(len(rows), 0)
        best_indices = torch.empty(len(rows), 0, dtype=torch.long, device=device)
        for offset in range(0, len(corpus), block):
            scores = rows @ torch.from_numpy(corpus[offset : offset + block]).to(device).T
            indices = torch.arange(offset, offset + scores.shape[1], device=device).expand_as(scores)
            # The best so far and this block's compete; only `top` of them are kept, so memory does not grow.
            best_scores = torch.cat([best_scores, scores], dim=1)
            best_indices = torch.cat([best_indices, indices], dim=1)
            best_scores, order = best_scores.topk(min(top, best_scores.shape[1]), dim=1)
            best_indices = best_indices.gather(1, order)
        results.append((best_scores.cpu().numpy(), best_indices.cpu().numpy()))
    all_scores, all_indices = zip(*results, strict=True)
    return np.concatenate(all_scores), np.concatenate(all_indices)
