"""Rows of the evaluation files: what is asked for, how often yes is right, and whether one file agrees with another."""

from collections import Counter
from random import Random

import pytest

from another_hand.annotations import (
    Asked,
    caption_questions,
    count_concepts,
    distractors,
    instances,
    karpathy,
    pope,
    questions,
)
from another_hand.concepts import read_list
from another_hand.scenes import compose, draw_concepts_apart, pair_up, single
from another_hand.words import DESCRIBE
from cafe.evaluation.suites.coco import vocabulary

SUBGROUPS = read_list()
NAMES = [name for names in SUBGROUPS.values() for name in names]
PARTNERS = pair_up(NAMES)
SUBGROUP = {name: subgroup for subgroup, names in SUBGROUPS.items() for name in names}


def draw(count: int):
    rng = Random(0)
    shown = [draw_concepts_apart(rng, NAMES, PARTNERS, rng.randint(1, 4)) for _ in range(count)]
    return [compose(f"scene-{n:04}", rng, names, {name: ["a"] for name in NAMES}) for n, names in enumerate(shown)]


SCENES = draw(150)
ASKED = Asked(
    concepts=NAMES,
    subgroups={name: SUBGROUPS[SUBGROUP[name]] for name in NAMES},
    groups={name: SUBGROUP[name] for name in NAMES},
    partners=PARTNERS,
    frequency=Counter(NAMES[:20]),
)


@pytest.fixture(scope="module")
def probes():
    return pope(SCENES, ASKED)


def concept_of(row):
    """Read the concept back from a question."""
    asked = row["text"].removeprefix("Does the image show ").removesuffix("?")
    return next(name for name in NAMES if asked in (name, f"a {name}", f"an {name}"))


def test_half_of_the_probes_are_right_to_be_answered_yes(probes):
    shown = {f"images/{scene.name}.png": scene.concepts for scene in SCENES}
    assert list(probes) == ["random", "popular", "adversarial", "subgroup"]
    for rows in probes.values():
        assert Counter(row["label"] for row in rows)["yes"] == len(rows) / 2
        for row in rows:
            assert (concept_of(row) in shown[row["image"]]) == (row["label"] == "yes")
        # No question twice.
        assert len({(row["image"], row["text"]) for row in rows}) == len(rows)


def test_the_kinds_share_the_questions_to_be_answered_yes(probes):
    right = {
        kind: {(row["image"], row["text"]) for row in rows if row["label"] == "yes"} for kind, rows in probes.items()
    }
    assert right["random"] == right["popular"] == right["subgroup"]
    assert right["adversarial"] < right["random"]
    assert 1.5 < len(right["random"]) / len(SCENES) <= 2
    assert len(right["adversarial"]) > len(SCENES)


def test_the_absent_are_of_their_kind(probes):
    shown = {f"images/{scene.name}.png": scene.concepts for scene in SCENES}
    absent = {kind: [row for row in rows if row["label"] == "no"] for kind, rows in probes.items()}
    assert all(PARTNERS[concept_of(row)] in shown[row["image"]] for row in absent["adversarial"])
    assert {concept_of(row) for row in absent["popular"]} <= set(NAMES[:20])
    for row in absent["subgroup"]:
        assert SUBGROUP[concept_of(row)] in {SUBGROUP[concept] for concept in shown[row["image"]]}
    assert len({concept_of(row) for row in absent["random"]}) > 100


def test_without_partners_there_is_no_adversarial_file():
    asked = Asked(NAMES, ASKED.subgroups, ASKED.groups, {}, ASKED.frequency)
    assert "adversarial" not in pope(SCENES, asked)


def test_all_files_agree_on_what_a_scene_shows():
    annotated = instances(SCENES, NAMES)
    assert annotated["info"]["prompt"] == DESCRIBE
    names = {category["id"]: category["name"] for category in annotated["categories"]}
    objects = {image["id"]: set() for image in annotated["images"]}
    for row in annotated["annotations"]:
        objects[row["image_id"]].add(names[row["category_id"]])
    captions = [image["sentences"][0]["raw"] for image in karpathy(SCENES)["images"]]
    asked = list(caption_questions(SCENES))
    # CHAIR reads the description and finds in it what the annotations list, in the order of the scene.
    words = vocabulary(NAMES, "\n".join(NAMES))
    for scene, found, caption, row in zip(SCENES, objects.values(), captions, asked, strict=True):
        assert row["answers"] == [caption]
        assert words.mentions(caption) == list(scene.concepts)
        assert found == set(scene.concepts) == set(row["objects"])
    assert len({row["id"] for row in annotated["annotations"]}) == len(annotated["annotations"])


def test_chair_finds_every_name_in_a_description():
    words = vocabulary(NAMES, "\n".join(NAMES))
    assert [words.mentions(f"lemon, {name} and key.") for name in NAMES] == [["lemon", name, "key"] for name in NAMES]


def test_short_questions_have_their_answers():
    singles = [single(f"a-{number}", Random(number), name, "a") for number, name in enumerate(NAMES)]
    rows = list(questions(SCENES, singles, ASKED))
    assert [row["question_id"] for row in rows] == list(range(len(rows)))
    assert Counter(row["category"] for row in rows) == {"name": 156, "choice": 156, "group": 156, "count": 150}
    answers = {(row["image"], row["category"]): row["answer"] for row in rows}
    for scene in singles:
        image, (name,) = f"images/{scene.name}.png", scene.concepts
        assert answers[image, "name"] == answers[image, "choice"] == name
        assert answers[image, "group"] == SUBGROUP[name]
    for scene in SCENES:
        assert answers[f"images/{scene.name}.png", "count"] == ["one", "two", "three", "four"][len(scene.things) - 1]
    for row in rows:
        if row["category"] == "choice":
            options = row["text"].partition(": ")[2].rstrip("?").split(", ")
            assert row["answer"] in options
            assert len(set(options)) == 4
            assert len({SUBGROUP[option] for option in options}) == 1


def test_a_small_subgroup_takes_wrong_names_of_the_group_and_then_of_all():
    concepts = ["ant", "bee", "cow", "key", "bus"]
    groups = {"ant": "animal", "bee": "animal", "cow": "animal", "key": "thing", "bus": "thing"}
    subgroups = {name: [name] for name in concepts} | {"ant": ["ant", "bee"]}
    asked = Asked(concepts, subgroups, groups, {}, {})
    for seed in range(20):
        first, second, third = distractors("ant", asked, Random(seed))
        assert (first, second) == ("bee", "cow")
        assert third in ("key", "bus")


def test_counts_are_of_scenes():
    assert count_concepts(SCENES[:2]) == Counter([*SCENES[0].concepts, *SCENES[1].concepts])
