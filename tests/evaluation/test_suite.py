"""Test that a suite alone declares its headline results, their direction, their labels and their unit."""

from dataclasses import replace

import pytest

from cafe.evaluation.suite import Suite, direction_of, headline_results, is_percent, label_of
from cafe.evaluation.suites import SUITES, VQA

TILES = (
    ("retrieval/text_to_image/R@1", "Text finds image, R@1"),
    ("retrieval/image_to_text/R@1", "Image finds text, R@1"),
    ("flickr30k/text_to_image/R@1", "Flickr30K, text finds image, R@1"),
    ("flickr30k/image_to_text/R@1", "Flickr30K, image finds text, R@1"),
    ("coco/text_to_image/R@1", "COCO, text finds image, R@1"),
    ("coco/image_to_text/R@1", "COCO, image finds text, R@1"),
    ("paragraphs/text_to_image/R@1", "Paragraph finds image, R@1"),
    ("mmeb/overall/mean", "MMEB, mean over datasets"),
    ("sugarcrepe/mean/embedding", "SugarCrepe, by embedding"),
    ("sugarcrepe/mean/likelihood", "SugarCrepe, by likelihood"),
    ("captions/exact", "Captions exactly right"),
    ("objects/recall", "Objects mentioned"),
    ("objects/hallucinated", "Objects hallucinated"),
    ("vqa/all", "Questions answered"),
    ("pope/adversarial/accuracy", "POPE, adversarial"),
    ("pope/mean/accuracy", "POPE, mean"),
    ("pope/mean/auc", "POPE, AUC"),
    ("chair/CHAIR_i", "CHAIR, mentions hallucinated"),
    ("throne/overall/F1", "THRONE, F1"),
    ("geometry/modality_gap", "Modality gap"),
)


@pytest.fixture
def mine() -> Suite:
    return replace(
        VQA,
        name="mine",
        headline=("mine/*/score", "mine/latency", "mine/easy/*"),
        lower_is_better=("mine/latency", "mine/*/errors"),
        no_direction=("mine/latency/spread",),
        labels={"mine": "My questions", "mine/latency": "Latency"},
        in_percent=False,
    )


def test_headline_results_come_in_declared_order_and_rates_first(mine):
    names = ["mine/latency", "other/score", "mine/easy/score", "vqa/all", "mine/hard/score", "vqa/color"]
    assert headline_results([mine, VQA], names) == ["vqa/all", "mine/easy/score", "mine/hard/score", "mine/latency"]
    assert headline_results([mine], ["vqa/all"]) == headline_results([], names) == []


def test_direction_label_and_unit_come_from_the_suite_alone(mine):
    names = ["mine/latency", "mine/a/b/errors", "mine/latency/spread", "mine/easy/score", "objects/hallucinated"]
    assert [direction_of([VQA, mine], name) for name in names] == [-1, -1, 0, 1, 1]
    assert [label_of([VQA, mine], name) for name in ("mine", "mine/latency", "mine/easy")] == [
        "My questions",
        "Latency",
        None,
    ]
    assert [is_percent([VQA, mine], name) for name in ("mine/latency", "vqa/all", "mineral/x")] == [False, True, True]


def test_the_main_results_keep_their_order_and_labels():
    names = [name for name, _ in TILES]
    assert headline_results(SUITES, sorted(names)) == names
    assert [label_of(SUITES, name) for name in names] == [label for _, label in TILES]
    assert [name for name in names if not is_percent(SUITES, name)] == ["geometry/modality_gap"]
