"""What the suites declare of their results: the headline metrics, and in which direction each result is better."""

import pytest

from cafe.evaluation.suite import direction_of, headline_results
from cafe.evaluation.suites import SUITES

HEADLINES = (
    *("retrieval/text_to_image/R@1", "retrieval/image_to_text/R@1"),
    *("flickr30k/text_to_image/R@1", "coco/image_to_text/R@1"),
    *("paragraphs/text_to_image/R@1", "paragraphs/image_to_text/R@1"),
    *("mmeb/overall/mean", "sugarcrepe/mean/embedding", "sugarcrepe/mean/likelihood"),
    *("aro/relation/embedding", "aro/attribution/likelihood"),
    *("winoground/embedding/group", "winoground/likelihood/group"),
    *("captions/exact", "objects/recall", "objects/hallucinated", "vqa/all", "vqav2/scenes/all"),
    *("pope/adversarial/accuracy", "pope/mean/accuracy", "pope/mean/auc"),
    *("chair/CHAIR_i", "throne/overall/F1"),
    "geometry/modality_gap",
)


@pytest.mark.parametrize("name", HEADLINES)
def test_each_headline_result_is_declared_by_exactly_one_suite(name):
    declaring = [suite for suite in SUITES if headline_results([suite], [name])]
    assert len(declaring) == 1 and headline_results(SUITES, [name]) == [name]


@pytest.mark.parametrize("part", ["geometry", "geometry/flickr30k"])
def test_geometry_is_better_when_lower_or_has_no_direction(part):
    lower = {f"{part}/{name}" for name in ("modality_gap", "separability", "alignment", "uniformity")}
    neither = {f"{part}/{side}_similarity" for side in ("matched", "mismatched")}
    neither |= {f"{part}/hubness_{side}" for side in ("images", "texts")}
    higher = {f"{part}/effective_rank_{side}" for side in ("images", "texts")}
    assert directions(lower | neither | higher) == {
        **dict.fromkeys(lower, -1),
        **dict.fromkeys(neither, 0),
        **dict.fromkeys(higher, 1),
    }


def test_other_results_have_their_direction():
    lower = ("objects/hallucinated", "pope/random/neither", "chair/CHAIR_i", "chair/CHAIR_s")
    lower += ("retrieval/image_to_text/median_rank", "coco/text_to_image/mean_rank")
    neither = (
        "pope/mean/yes_ratio",
        "pope/own/likelihood_yes_ratio",
        "chair/mentions",
        "throne/overall/split",
        "mmeb/overall/datasets",
    )
    neither += ("aro/coco_order/chance", "aro/flickr30k_order/left_out")
    higher = set(HEADLINES) - {"objects/hallucinated", "chair/CHAIR_i", "geometry/modality_gap"}
    higher |= {"mmeb/SUN397/P@1", "vqa/neither", "throne/class/F0.5", "cider/CIDEr"}
    assert set(directions(lower).values()) == {-1}
    assert set(directions(neither).values()) == {0}
    assert set(directions(higher).values()) == {1}


def directions(names) -> dict[str, int]:
    return {name: direction_of(SUITES, name) for name in names}
