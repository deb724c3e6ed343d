"""Training records: no answer that earlier turns tell, nothing that is more often absent than it is shown."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from another_hand.concepts import TRAINING_HANDS, Concept, read_list
from another_hand.retrieval import in_another_language, retrieval_tables, texts
from another_hand.scenes import single
from another_hand.training_records import (
    ask,
    describe,
    draw_training_scenes,
    draw_training_singles,
    frequencies,
    name,
)
from another_hand.words import COUNT, GROUP, NAME
from cafe.data.formats.llava import llava
from cafe.data.formats.pairs import pairs
from cafe.data.source import Source

CONCEPTS = [
    Concept("", name, f"group of {subgroup}", subgroup, ("one", "two"), {"de": f"{name}-e"}, {"twemoji": "icon"}, True)
    for subgroup, names in read_list().items()
    for name in names
]
BY_NAME = {concept.name: concept for concept in CONCEPTS}
SCENES = draw_training_scenes(CONCEPTS, 3000, 3, 0)
SINGLES = draw_training_singles(CONCEPTS, 1500, 3, 0)
DRAWN = frequencies(CONCEPTS, SCENES)


@pytest.fixture(scope="module")
def dialogues():
    """Return the exchanges about each scene or single drawing."""
    asked = {}
    for shown in (SCENES, SINGLES):
        drawn = frequencies(CONCEPTS, shown)
        for scene in shown:
            turns = [turn["value"].removeprefix("<image>\n") for turn in ask(scene, drawn, 0)["conversations"]]
            asked[scene] = list(zip(turns[::2], turns[1::2], strict=True))
    return asked


def probed(question):
    """Read the concept of a question about presence back; None of another question."""
    if not question.startswith("Does the image show "):
        return None
    asked = question.removeprefix("Does the image show ").removesuffix("?")
    return next(name for name in BY_NAME if asked in (name, f"a {name}", f"an {name}"))


def test_presence_is_right_and_yes_as_often_as_no(dialogues):
    answers = Counter()
    for scene, exchanges in dialogues.items():
        for question, answer in exchanges:
            if concept := probed(question):
                assert (concept in scene.concepts) == (answer == "yes")
                answers[scene.single, answer] += 1
    for is_single in (True, False):
        assert answers[is_single, "yes"] / (answers[is_single, "yes"] + answers[is_single, "no"]) == pytest.approx(
            0.5, abs=0.05
        )


def test_what_is_frequent_in_scenes_is_as_frequently_asked_for_in_vain(dialogues):
    asked = {"yes": Counter(), "no": Counter()}
    for exchanges in dialogues.values():
        for question, answer in exchanges:
            if concept := probed(question):
                asked[answer][concept] += 1
    counts = Counter(concept for scene in SCENES for concept in scene.concepts)
    ranked = sorted(BY_NAME, key=lambda concept: counts[concept])
    # The rarer half of the concepts and the more frequent one: to know frequency alone is no help.
    rarer, frequent = ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :]
    for half in (rarer, frequent):
        yes, no = (sum(asked[answer][concept] for concept in half) for answer in ("yes", "no"))
        assert yes / (yes + no) == pytest.approx(0.5, abs=0.06)
    assert np.corrcoef(*([asked[answer][c] for c in BY_NAME] for answer in ("yes", "no")))[0, 1] > 0


def test_no_turn_names_what_an_earlier_one_named_and_nothing_tells_an_answer(dialogues):
    for scene, exchanges in dialogues.items():
        earlier = ""
        for question, answer in exchanges:
            named = {concept for concept in BY_NAME if f" {concept}" in f" {question} {answer}"}
            assert not any(f" {concept} " in earlier.replace(",", " ").replace("?", " ") for concept in named)
            earlier += f" {question} {answer} "
        kinds = [question for question, _ in exchanges]
        assert len({answer for _, answer in exchanges}) == len(exchanges)
        assert kinds.count(COUNT) <= 1
        if scene.single:
            # After any other question the group would be known.
            assert len(kinds) == 1 or kinds == [GROUP, NAME]
        else:
            assert probed(kinds[0])


def test_cafe_reads_the_records():
    dialogue_of = llava(describe(SCENES[0], DRAWN, 0), Source(path="a.json"), Random(0))
    assert (
        dialogue_of[0].target.text
        == dialogue_of[1].turns[1].content.text
        == describe(SCENES[0], DRAWN, 0)["conversations"][1]["value"]
    )
    record = name(SINGLES[0], BY_NAME, 0)
    (concept,) = SINGLES[0].concepts
    found = set()
    for seed in range(60):
        pair, dialogue = pairs(record, Source(path="a.json", format="pairs"), Random(seed))
        assert pair.query.images == dialogue.turns[0].content.images
        assert dialogue.turns[1].content.text == concept
        found.add(pair.target.text)
    assert found == set(record["positive"])


def test_single_drawings_show_each_concept_equally_often_by_training_hands():
    counts = Counter(scene.concepts[0] for scene in SINGLES)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert {thing.hand for scene in [*SCENES, *SINGLES] for thing in scene.things} <= set(TRAINING_HANDS)


def test_a_third_of_the_texts_is_the_name():
    fox = Concept("", "fox", "g", "s", ("red", "sly"), {"de": "Fuchs", "sv": "räv", "xx": "Fox"}, {}, True)
    drawn = texts(fox, Random(0))
    assert drawn.count("fox") == len(drawn) / 3
    assert {in_another_language(fox, Random(seed)) for seed in range(20)} == {"Fuchs", "räv"}
    assert texts(Concept("", "fox", "g", "s", (), {}, {}, True), Random(0)) == ["fox", "fox"]


def test_the_right_candidate_comes_first_and_equal_words_are_left_out():
    concepts = {
        "ant": Concept("", "ant", "g", "s", ("small",), {"de": "Tier"}, {}, True),
        "bee": Concept("", "bee", "g", "s", (), {"de": "Tier"}, {}, True),
        "cow": Concept("", "cow", "g", "s", ("big", "milk"), {"de": "Kuh"}, {}, True),
    }
    gallery = [single(f"a-{concept}", Random(0), concept, "a") for concept in concepts]
    tables = retrieval_tables([gallery], concepts)
    names = [row["tgt_text"] for row in tables["name-image-to-text"]]
    assert [row[0] for row in names] == [f"{concept}Compress this sentence in one word:" for concept in concepts]
    assert [len(set(row)) for row in names] == [3, 3, 3]
    to_image = tables["name-text-to-image"]
    assert [(row["qry_text"][:3], row["tgt_img_path"][0]) for row in to_image] == [
        (concept, f"images/a-{concept}.png") for concept in concepts
    ]
    assert [row["qry_img_path"] for row in tables["keywords-image-to-text"]] == ["images/a-ant.png", "images/a-cow.png"]
    assert [row["qry_text"][:3] for row in tables["language-text-to-image"]] == ["Kuh"]


def test_a_hard_negative_differs_in_one_object_that_the_scene_does_not_show():
    same_subgroup = 0
    for scene in SCENES[:500]:
        (negative,) = describe(scene, DRAWN, 0)["negatives"]
        # One name has an "and" of its own.
        said = negative.removesuffix(".").replace(" and ", ", ").replace("fork, knife", "fork and knife").split(", ")
        ((wrong, other),) = [pair for pair in zip(scene.concepts, said, strict=True) if pair[0] != pair[1]]
        assert other not in scene.concepts
        same_subgroup += BY_NAME[wrong].subgroup == BY_NAME[other].subgroup
    assert same_subgroup > 450
