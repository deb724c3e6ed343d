"""Test where the arms of an ablation stand between retrieval and generation, and which are on the Pareto front."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cafe.evaluation.report.trade_off import Ablation, mean_and_deviation, pareto_front, trade_off_panels
from cafe.evaluation.suites import POPE, RETRIEVAL, SUITES, VQA

UP, BACK = "retrieval/text_to_image/R@1", "retrieval/image_to_text/R@1"
FEW = st.integers(-3, 3).map(float)  # many ties


@given(st.lists(st.tuples(FEW, FEW), min_size=1, max_size=12))
def test_the_front_is_that_of_comparing_every_two_points(points):
    def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] >= b[0] and a[1] >= b[1] and a != b

    expected = [not any(dominates(other, point) for other in points) for point in points]
    assert pareto_front(np.array(points)).tolist() == expected


def run(up: float, back: float, **others: float) -> dict[str, float]:
    return {UP: up, BACK: back, **{name.replace("__", "/"): value for name, value in others.items()}}


def test_a_point_is_the_mean_over_seeds_with_the_deviation_of_both_axes():
    joint = [run(60, 80, vqa__all=90), run(70, 90, vqa__all=96), run(80, 70, vqa__all=93)]
    ablation = Ablation({"base": [run(0, 1, vqa__all=97)], "joint": joint})
    [panel] = trade_off_panels(ablation, [RETRIEVAL, VQA])
    assert panel.arms == ["base", "joint"]
    np.testing.assert_allclose(panel.means, [[0.5, 97], [75, 93]])
    np.testing.assert_allclose(panel.deviations, [[0, 0], [np.std([70, 80, 75], ddof=1), np.std([90, 96, 93], ddof=1)]])
    assert panel.labels == ("Mean of: Text finds image, R@1; Image finds text, R@1, %", "Questions answered, %")
    assert panel.on_front.tolist() == [True, True]
    assert mean_and_deviation([4.0]) == (4.0, 0.0)


@pytest.mark.parametrize(
    ("lower_is_better", "front"), [((), [False, True, True]), (("mine/rate",), [True, False, True])]
)
def test_a_suite_alone_decides_its_axis_direction_and_unit(lower_is_better, front):
    measured = {
        "a": [{"mine/rate": 1.0, "found/rate": 5.0}],
        "b": [{"mine/rate": 2.0, "found/rate": 5.0}],
        "c": [{"mine/rate": 2.0, "found/rate": 6.0} | {"mine/rate": 1.5}],
    }
    found = replace(RETRIEVAL, name="found", retrieval=("found/*",), labels={"found/rate": "Found"}, in_percent=False)
    mine = replace(VQA, name="mine", generation=("mine/auc", "mine/rate"), lower_is_better=lower_is_better, labels={})
    [panel] = trade_off_panels(Ablation(measured), [mine, found])
    assert panel.labels == ("Found", "mine/rate, %" + (" (lower is better)" if lower_is_better else ""))
    assert panel.on_front.tolist() == front


def test_the_first_result_that_was_measured_is_drawn_and_arms_without_it_are_not():
    measured = {
        "old": [run(1, 1, pope__mean__accuracy=50)],
        "new": [run(2, 2, pope__mean__accuracy=60, pope__mean__auc=70)],
        "newer": [run(3, 3, pope__mean__accuracy=61, pope__mean__auc=71)],
        "broken": [run(3, 3, pope__mean__auc=71), run(3, 3, pope__mean__auc=math.nan)],
    }
    [panel] = trade_off_panels(Ablation(measured), [RETRIEVAL, POPE])
    assert panel.arms == ["new", "newer"] and panel.means[:, 1].tolist() == [70, 71]
    del measured["newer"]
    assert trade_off_panels(Ablation(measured), [RETRIEVAL, POPE]) == []


def test_without_retrieval_or_generation_there_is_no_panel():
    for results in ({"vqa/all": 1.0}, {UP: 1.0, BACK: 2.0}, {}):
        assert trade_off_panels(Ablation({"a": [results], "b": [results]}), SUITES) == []
