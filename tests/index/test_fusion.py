"""Reciprocal rank fusion, against its formula."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cafe.index.fusion import fuse_ranks


@given(st.lists(st.lists(st.integers(0, 9), unique=True), max_size=4))
def test_an_images_sum_is_of_the_reciprocals_of_its_ranks(rankings):
    fused = fuse_ranks([np.array(ranking, np.int64) for ranking in rankings], 10)
    for image in range(10):
        expected = sum(1 / (60 + ranking.index(image) + 1) for ranking in rankings if image in ranking)
        assert np.isclose(fused[image], expected)
