"""Test that intervals and paired tests agree with SciPy, with scikit-learn, with loops and with trying every swap."""

from fractions import Fraction
from itertools import product
from math import comb
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from cafe.evaluation.report.significance import bootstrap_interval, compare, mcnemar, tally_results
from cafe.evaluation.suite import aggregate
from cafe.evaluation.suites.pope import contributions


def rows_of(right: np.ndarray, groups: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Make outputs of samples that are right or wrong."""
    named = {} if groups is None else {"group": groups}
    return [
        {"id": n, "marks": {"a": int(mark)}, **{key: str(values[n]) for key, values in named.items()}}
        for n, mark in enumerate(right)
    ]


def coin(seed: int, count: int, chance: float | np.ndarray) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < chance


def test_a_tally_gives_the_result_that_was_written():
    rows: list[dict[str, Any]] = [{"marks": {"p": [1, 3], "q": 1}}, {"marks": {"p": (2, 2)}}, {"marks": {"q": 0}}]
    assert (
        {name: tally.value for name, tally in tally_results(rows).items()} == aggregate(rows) == {"p": 60.0, "q": 50.0}
    )


def test_the_interval_of_a_rate_agrees_with_scipys_bootstrap():
    right = coin(0, 400, 0.7)
    low, high = bootstrap_interval([tally_results(rows_of(right))["a"]], num_resamples=4000)
    reference = stats.bootstrap((right,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert [low, high] == pytest.approx([100 * reference.low, 100 * reference.high], abs=0.5)
    random = np.random.default_rng(2)
    means = [100 * right[random.integers(400, size=400)].mean() for _ in range(4000)]
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.5)


def test_the_interval_of_a_single_group_is_its_result():
    rows = [{"group": "a.png", "marks": {"a": mark}} for mark in (1, 0, 1, 1)]
    parts = [tally_results(rows)["a"]]
    assert bootstrap_interval(parts) == (75, 75)
    found = compare(parts, parts)
    assert found is not None and (found.low, found.high, found.permutation) == (0, 0, 1)


def test_the_interval_of_f1_agrees_with_resampling_and_scikit_learn():
    labels, said = coin(1, 150, 0.5), coin(2, 150, 0.6)
    rows = [
        {"id": n, "marks": contributions("yes" if s else "no", t, "x")}
        for n, (s, t) in enumerate(zip(said, labels, strict=True))
    ]
    low, high = bootstrap_interval([tally_results(rows)["x/F1"]], num_resamples=3000)
    random = np.random.default_rng(5)
    drawn = [f1_score(labels[chosen], said[chosen]) for chosen in random.integers(150, size=(600, 150))]
    assert [low, high] == pytest.approx((100 * np.quantile(drawn, [0.025, 0.975])).tolist(), abs=1.5)


def test_repeated_samples_of_an_image_do_not_narrow_the_interval():
    """Test that ten equal answers about each image count as one."""
    right = coin(3, 60, 0.5)
    alone = bootstrap_interval([tally_results(rows_of(right))["a"]])
    repeated = rows_of(np.repeat(right, 10), np.repeat(np.arange(60), 10))
    assert bootstrap_interval([tally_results(repeated)["a"]]) == pytest.approx(alone)
    ungrouped = bootstrap_interval([tally_results(rows_of(np.repeat(right, 10)))["a"]])
    assert ungrouped[1] - ungrouped[0] < 0.5 * (alone[1] - alone[0])


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (3, 9), (9, 3), (10, 10), (400, 520)])
def test_mcnemar_agrees_with_the_binomial_test(only_first, only_second):
    count, fewer = only_first + only_second, min(only_first, only_second)
    expected = stats.binomtest(only_first, count).pvalue if count else 1.0
    assert mcnemar(only_first, only_second) == pytest.approx(expected)
    tail = Fraction(sum(comb(count, k) for k in range(fewer + 1)), 2**count)  # the binomial distribution's, both sides
    assert mcnemar(only_first, only_second) == pytest.approx(float(min(1, 2 * tail)))


def test_the_permutation_test_agrees_with_trying_every_swap():
    groups = np.arange(24) // 2  # 12 images of two samples each
    first, second = coin(6, 24, 0.4), coin(7, 24, 0.8)
    found = compare(
        [tally_results(rows_of(first, groups))["a"]], [tally_results(rows_of(second, groups))["a"]], num_resamples=20000
    )
    assert found is not None
    observed = second.mean() - first.mean()
    differences = (second.astype(int) - first).reshape(12, 2).sum(axis=1)
    every = [abs(np.dot(signs, differences)) / 24 >= abs(observed) - 1e-12 for signs in product((-1, 1), repeat=12)]
    assert found.permutation == pytest.approx(np.mean(every), abs=0.01)
    assert found.difference == pytest.approx(100 * observed)
    assert found.mcnemar == pytest.approx(mcnemar((first & ~second).sum(), (second & ~first).sum()))


def test_the_permutation_test_agrees_with_scipys():
    first, second = coin(8, 80, 0.5), coin(9, 80, 0.62)
    found = compare([tally_results(rows_of(first))["a"]], [tally_results(rows_of(second))["a"]], num_resamples=10000)
    reference = stats.permutation_test(
        (second.astype(float), first.astype(float)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10000,
        rng=3,
    )
    assert found is not None and found.permutation == pytest.approx(reference.pvalue, abs=0.02)


def test_a_checkpoint_does_not_differ_from_itself():
    tally = tally_results(rows_of(coin(4, 50, 0.5)))["a"]
    found = compare([tally], [tally])
    assert found is not None
    assert (found.difference, found.low, found.high, found.permutation, found.mcnemar) == (0, 0, 0, 1, 1)


def test_samples_are_paired_by_id_and_not_by_position():
    first, second = rows_of(coin(10, 40, 0.5)), rows_of(coin(11, 40, 0.7))
    shuffled = [second[n] for n in np.random.default_rng(0).permutation(40)]
    assert compare([tally_results(first)["a"]], [tally_results(shuffled)["a"]]) == compare(
        [tally_results(first)["a"]], [tally_results(second)["a"]]
    )


def test_outputs_of_other_samples_are_not_compared():
    assert (
        compare([tally_results(rows_of(coin(0, 10, 0.5)))["a"]], [tally_results(rows_of(coin(0, 11, 0.5)))["a"]])
        is None
    )


def test_mcnemar_is_left_out_where_samples_are_not_right_or_wrong():
    rows = [{"id": n, "marks": {"a": [n % 3, 3]}} for n in range(9)]
    found = compare([tally_results(rows)["a"]], [tally_results(rows)["a"]])
    assert found is not None and found.mcnemar is None


def test_the_same_outputs_give_the_same_intervals():
    rows = rows_of(coin(0, 30, 0.5))
    assert bootstrap_interval([tally_results(rows)["a"]]) == bootstrap_interval([tally_results(rows)["a"]])


def test_parts_of_a_mean_with_the_same_images_are_resampled_together():
    images = np.arange(80)
    easy = np.random.default_rng(1).random(80)  # an image is easy or hard in all parts
    parts = [coin(seed, 80, easy) for seed in (2, 3, 4)]
    together = bootstrap_interval([tally_results(rows_of(part, images))["a"] for part in parts], num_resamples=4000)
    random = np.random.default_rng(9)
    drawn = [100 * np.mean([part[chosen] for part in parts]) for chosen in random.integers(80, size=(4000, 80))]
    assert together == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1)
    order = np.random.default_rng(0).permutation(80)  # in which a part's file asks about the same images
    again = [
        tally_results(rows_of(part[way], images[way])) for part, way in zip(parts, (images, order, order), strict=True)
    ]
    assert bootstrap_interval([found["a"] for found in again], num_resamples=4000) == pytest.approx(together)


def test_parts_of_a_mean_with_other_images_are_resampled_independently():
    parts = [coin(seed, 60 + seed, 0.5) for seed in range(4)]
    named = [np.array([f"{seed} {n}" for n in range(60 + seed)]) for seed in range(4)]
    apart = bootstrap_interval(
        [tally_results(rows_of(*pair))["a"] for pair in zip(parts, named, strict=True)], num_resamples=4000
    )
    random = np.random.default_rng(9)
    drawn = [100 * np.mean([random.choice(part, len(part)).mean() for part in parts]) for _ in range(4000)]
    assert apart == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1)


def test_a_mean_is_compared_part_by_part_and_has_no_mcnemar():
    first = [tally_results(rows_of(coin(seed, 40, 0.3)))["a"] for seed in range(3)]
    second = [tally_results(rows_of(coin(seed, 40, 0.9)))["a"] for seed in range(3)]
    found = compare(first, second)
    assert found is not None and found.mcnemar is None and found.permutation < 0.01
    assert found.difference == pytest.approx(np.mean([b.value - a.value for a, b in zip(first, second, strict=True)]))
    assert compare(first, second[:2]) is None
