"""Test that the chart of the trade-off shows every arm by name or value, and stands alone as a file."""

import re
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from cafe.evaluation.report.trade_off import Ablation
from cafe.evaluation.report.trade_off_chart import standalone_svg, trade_off_chart
from cafe.evaluation.suites import SUITES

WEIGHTS = {"0.1": "joint w=0.1", "1": "joint", "10": "joint w=10"}


def results(retrieval: float, quality: float) -> dict[str, float]:
    return {
        "retrieval/text_to_image/R@1": retrieval,
        "retrieval/image_to_text/R@1": retrieval,
        "objects/hallucinated": 100 - quality,
        "pope/mean/accuracy": quality,
    }


@pytest.fixture
def ablation() -> Ablation:
    points = {"base": (0, 98), "contrastive": (80, 50), "language": (0, 95), "joint": (76, 93)}
    points |= {"joint w=0.1": (60, 95), "joint w=10": (80, 88)}
    measured = {arm: [results(x, y), results(x + 1, y + 1)] for arm, (x, y) in points.items()}
    return Ablation(measured, {"w": WEIGHTS})


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_chart_names_the_arms_and_the_close_up_the_values(ablation):
    chart = trade_off_chart(ablation, SUITES)
    assert isinstance(chart, Markup)
    written = texts(chart)
    # Two suites of generated text, each seen whole and from close up.
    for name, count in {"base": 2, "contrastive": 2, "language": 2, "joint": 4}.items():
        assert written.count(name) == count, name
    assert written.count("0.1") == 2 and written.count("joint, by w") == 1
    assert written.count("Objects hallucinated, % (lower is better)") == written.count("POPE, mean, %") == 2


def test_without_a_sweep_there_is_no_close_up(ablation):
    measured = {arm: runs for arm, runs in ablation.measured.items() if arm not in ablation.swept}
    written = texts(trade_off_chart(Ablation(measured), SUITES))
    assert [written.count(name) for name in ("base", "joint", "joint, by w")] == [2, 2, 0]
    assert trade_off_chart(Ablation({"base": ablation.measured["base"]}), SUITES) is None


def test_the_file_has_colors_for_light_and_dark_and_loads_nothing(ablation):
    svg = standalone_svg(trade_off_chart(ablation, SUITES))
    root = ElementTree.fromstring(svg.encode())
    assert root.get("role") == "img" and root.get("aria-label")
    assert "prefers-color-scheme: dark" in svg and "currentColor" in svg and "#0a0b0c" not in svg
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', svg)) and "<script" not in svg


def test_equal_runs_and_any_name_can_be_drawn():
    value = "<b>$\\frac$ & 'x'" + "y" * 100
    swept = f"joint f={value}"
    measured = {arm: [results(50, 50)] for arm in ("base", "joint", swept)}
    chart = trade_off_chart(Ablation(measured, {"f": {value: swept}}), SUITES)
    assert any(text.startswith("<b>$\\frac$") and text.endswith("…") for text in texts(chart))
    assert chart == trade_off_chart(Ablation(measured, {"f": {value: swept}}), SUITES)
