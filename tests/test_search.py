"""Search finds the nearest neighbors exactly, with and without FAISS."""

import numpy as np
import pytest
from samples import unit

from cafe.search import search, search_blocks


@pytest.mark.parametrize("backend", ["faiss", "blocks"])
def test_search_is_exact(backend):
    queries, corpus = unit(37, 8, 0), unit(101, 8, 1)
    scores, indices = search(queries, corpus, 9) if backend == "faiss" else search_blocks(queries, corpus, 9, block=16)
    exact = queries.astype(np.float64) @ corpus.T.astype(np.float64)
    expected = np.argsort(-exact, axis=1)[:, :9]
    assert (indices == expected).all()
    np.testing.assert_allclose(scores, np.take_along_axis(exact, expected, 1), atol=1e-6)
