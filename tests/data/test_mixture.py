"""The order of an epoch: nothing twice, nothing left out, shares kept, batches of one source."""

from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.data.mixture import Mixture, epoch_order, largest_remainder, mixing_weights, windowed_shuffle
from cafe.errors import CafeError


def order(sizes, batch, mixture=None, weights=None, seed=0, windows=None):
    chunks = [size if isinstance(size, list) else [size] for size in sizes]
    ones = [1.0] * len(sizes)
    drawn = epoch_order(chunks, windows or [8] * len(sizes), weights or ones, mixture or Mixture(), batch, Random(seed))
    return list(zip(drawn.sources.tolist(), drawn.records.tolist(), strict=True))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(5, 40), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 99))
def test_proportional_order_has_no_duplicates_and_drops_less_than_a_batch(sizes, batch, seed):
    drawn = order(sizes, batch, seed=seed)
    assert len(drawn) == sum(sizes) // batch * batch == len(set(drawn))
    count = Counter(source for source, _ in drawn)
    assert all(abs(count[source] - size * len(drawn) / sum(sizes)) < 1 for source, size in enumerate(sizes))


def test_one_source_alone_is_plainly_shuffled():
    expected = list(range(48))
    Random("order 3 1").shuffle(expected)
    drawn = epoch_order([[48]], [8], [1.0], Mixture(), 8, Random("order 3 1"))
    assert drawn.records.tolist() == expected and not drawn.sources.any()


def test_shares_follow_weight_and_temperature():
    assert mixing_weights([100, 300], [1, 1], 1) == pytest.approx([0.25, 0.75])
    assert mixing_weights([100, 300], [3, 1], 1) == pytest.approx([0.5, 0.5])
    flat = np.array([100, 400]) ** 0.5
    np.testing.assert_allclose(mixing_weights([100, 400], [1, 1], 2), flat / flat.sum())
    np.testing.assert_allclose(mixing_weights([1, 10**6], [1, 1], 1e9), [0.5, 0.5], atol=1e-6)
    assert mixing_weights([10**6, 10**5, 0], [1, 1, 1], 1e-3) == [1, 0, 0]
    assert mixing_weights([10**6, 10**5], [0, 1], 1e-3) == [0, 1]
    drawn = order([20, 180], 10, weights=[9.0, 1.0])
    assert Counter(source for source, _ in drawn) == {0: 100, 1: 100}
    again = Counter(record for source, record in drawn if source == 0)
    assert set(again.values()) == {5}  # as often as any other of its source
    assert order([20, 180], 10, weights=[1.0, 0.0]) == order([20], 10)  # a source without a weight is left out


@pytest.mark.parametrize("sub_batch", [0, 4, 6, 12])
def test_a_batch_is_of_one_source_or_of_sub_batches_of_one(sub_batch):
    drawn = order([60, 120, 37], 12, Mixture(sub_batch=sub_batch))
    run = sub_batch or 12
    runs = [{source for source, _ in drawn[start : start + run]} for start in range(0, len(drawn), run)]
    assert all(len(sources) == 1 for sources in runs)
    first = [next(iter(sources)) for sources in runs]
    assert set(first) == {0, 1, 2} and first != sorted(first)
    count = Counter(first)
    assert all(abs(count[source] - size / 217 * len(runs)) < 1 for source, size in enumerate((60, 120, 37)))


def test_the_order_depends_on_the_seed_alone():
    assert order([30, 50], 8, seed=1) == order([30, 50], 8, seed=1) != order([30, 50], 8, seed=2)


def test_chunks_of_a_window_are_mixed_and_read_together():
    drawn = windowed_shuffle([10] * 12, 3, Random(0))
    assert sorted(drawn) == list(range(120)) and not np.array_equal(drawn, np.arange(120))
    for start in range(0, 120, 30):
        assert len(set((drawn[start : start + 30] // 10).tolist())) == 3
    assert sorted(windowed_shuffle([10] * 12, 100, Random(0))) == list(range(120))


def test_largest_remainder_adds_up():
    assert largest_remainder([0.5, 0.25, 0.25], 10) == [5, 3, 2] and largest_remainder([1.0], 7) == [7]
    parts = [0.1, 0.2, 0.3, 0.4]
    assert largest_remainder(parts, 1000) == [100, 200, 300, 400]


def test_a_mixture_that_cannot_be_made_is_an_error():
    with pytest.raises(CafeError, match="sub_batch is 5, which does not divide the contrastive batch of 12"):
        order([60], 12, Mixture(sub_batch=5))
    for mixture, weights in ((Mixture(temperature=0), None), (None, [0.0]), (None, [-1.0])):
        with pytest.raises(CafeError, match="above 0"):
            order([60], 12, mixture, weights)
    with pytest.raises(CafeError, match="holds 3 records, fewer than one batch of 4"):
        order([3], 4)
    with pytest.raises(CafeError, match=r"sources\[0\] is 0.10% of the mixture, too little"):
        order([1, 999], 100, Mixture(sub_batch=0))
