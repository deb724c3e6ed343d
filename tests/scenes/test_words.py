"""Every text about a scene is true: captions are parsed word by word, and answers found again by brute force."""

import re
from random import Random

import pytest

from cafe.scenes.words import (
    QUESTION_KINDS,
    article,
    caption,
    captions,
    hard_negatives,
    near_miss,
    paragraph,
    questions,
)
from cafe.scenes.world import COLORS, KINDS, PLACES, SIZES, Scene, Thing, draw_scenes

SCENES = draw_scenes(3, "train", 300) + draw_scenes(3, "test", 100)
COUNT_WORDS = ["zero", "one", "two", "three", "four"]
FULL = rf"a (?P<size>{'|'.join(SIZES)}) (?P<color>{'|'.join(COLORS)}) (?P<kind>{'|'.join(KINDS)})"
PLACE = rf"(?P<place>{'|'.join(PLACES)})"
PHRASES = [rf"{FULL} (?:at|in) the {PLACE}", rf"{PLACE}: {FULL}"]
SIDES = {  # of the first thing seen from the second, each standing at (row, column)
    "left of": lambda a, b: a[0] == b[0] and a[1] < b[1],
    "right of": lambda a, b: a[0] == b[0] and a[1] > b[1],
    "above": lambda a, b: a[1] == b[1] and a[0] < b[0],
    "below": lambda a, b: a[1] == b[1] and a[0] > b[0],
}


def read(text: str) -> list[Thing]:
    """Parse the things in a caption, in its order; fails where any word is left over."""
    assert text.endswith(".")
    phrases = re.split(", | and ", text.removeprefix("there is ").removesuffix("."))
    matches = [next(filter(None, (re.fullmatch(form, phrase) for form in PHRASES)), None) for phrase in phrases]
    assert all(matches), text
    return [Thing(**match.groupdict()) for match in matches if match]


def cell(thing: Thing) -> tuple[int, int]:
    """Return the row and column of a thing."""
    vertical, horizontal = thing.place.split()
    return ["top", "bottom"].index(vertical), ["left", "right"].index(horizontal)


def only(values: list[str]) -> str:
    assert len(values) == 1, values
    return values[0]


def solve(things: tuple[Thing, ...], question: str) -> str:
    """Answer a question by trying every thing; fails where several answers are right."""
    names = {f"{thing.color} {thing.kind}": thing for thing in things}
    if match := re.fullmatch(r"Is there (an?) (.+?)( in the image)?\?", question):
        assert match[1] == ("an" if match[2].split()[0] in ("orange", "eight") else "a")
        return "yes" if match[2] in ([t.kind for t in things] if match[3] else names) else "no"
    if match := re.fullmatch(r"How many (?:(\w+) )?objects are there\?", question):
        return COUNT_WORDS[sum(match[1] in (None, thing.color) for thing in things)]
    if match := re.fullmatch(r"What color is the object at the (.+)\?", question):
        return only([thing.color for thing in things if thing.place == match[1]])
    if match := re.fullmatch(r"What color is the (\w+)\?", question):
        return only([thing.color for thing in things if thing.kind == match[1]])
    if match := re.fullmatch(r"What is the object at the (.+)\?", question):
        return only([thing.kind for thing in things if thing.place == match[1]])
    if match := re.fullmatch(r"What is the (\w+) object\?", question):
        return only([thing.kind for thing in things if thing.color == match[1]])
    if match := re.fullmatch(r"Where is the (\w+ \w+)\?", question):
        return names[match[1]].place
    match = re.fullmatch(r"What is (left of|right of|above|below) the (\w+ \w+)\?", question)
    assert match, question
    seen_from = cell(names[match[2]])
    return only([name for name, thing in names.items() if SIDES[match[1]](cell(thing), seen_from)])


def test_every_caption_names_exactly_the_things() -> None:
    for scene in SCENES:
        texts = captions(scene.things)
        assert len(set(texts)) == len(texts)
        for text in texts:
            assert len(read(text)) == len(scene.things) and set(read(text)) == set(scene.things), text


def test_a_random_caption_is_one_of_the_captions() -> None:
    for scene in SCENES:
        assert caption(scene.things, Random(scene.name)) in captions(scene.things)


def check_sentence(scene: Scene, sentence: str) -> None:
    if match := re.fullmatch(r"The picture shows (\w+) (objects?) on a (\w+) (\w+) background", sentence):
        count = len(scene.things)
        assert match.groups() == (COUNT_WORDS[count], "objects" if count > 1 else "object", scene.texture, scene.tone)
    elif match := re.fullmatch(r"The (\w+ \w+) is (left of|right of|above|below) the (\w+ \w+)", sentence):
        first, second = (next(t for t in scene.things if f"{t.color} {t.kind}" == match[i]) for i in (1, 3))
        assert SIDES[match[2]](cell(first), cell(second)), sentence
    else:
        match = re.fullmatch(rf"(?:At the {PLACE} there is|In the (?P<where>.+) stands) {FULL}", sentence)
        assert match, sentence
        named = match.groupdict()
        where = named.pop("where")
        assert Thing(**{**named, "place": where or named["place"]}) in scene.things


def test_every_sentence_of_a_paragraph_is_true() -> None:
    for scene in SCENES:
        sentences = paragraph(scene, Random(scene.name)).removesuffix(".").split(". ")
        assert len(sentences) >= 1 + len(scene.things)
        for sentence in sentences:
            check_sentence(scene, sentence)


def test_every_answer_is_right_and_the_only_one() -> None:
    for scene in SCENES:
        for round_ in range(5):
            for question in questions(scene, Random(f"{round_} {scene.name}")):
                assert solve(scene.things, question.text) == question.answer, (scene, question)


def test_questions_keep_the_order_of_kinds_and_cover_all() -> None:
    for scene in SCENES:
        kinds = [question.kind for question in questions(scene, Random(scene.name))]
        assert kinds in (list(QUESTION_KINDS), list(QUESTION_KINDS[:-1]))
    assert any(len(questions(scene, Random(0))) == len(QUESTION_KINDS) for scene in SCENES)


@pytest.mark.parametrize("ending", ["?", " in the image?"])
def test_both_presence_questions_have_both_answers_equally_often(ending: str) -> None:
    answers = []
    for scene in SCENES:
        asked = questions(scene, Random(scene.name))[0]
        if asked.text.endswith(" in the image?") == (ending != "?"):
            answers.append(asked.answer)
    assert 0.4 < len(answers) / len(SCENES) < 0.6
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_hard_negatives_are_false_and_change_what_their_name_says() -> None:
    for scene in SCENES:
        negatives = hard_negatives(scene.things, Random(scene.name))
        assert {"replace_obj", "replace_att"} <= set(negatives)
        assert len(scene.things) == 1 or "swap_obj" in negatives
        for change, things in negatives.items():
            assert set(things) != set(scene.things), change
            assert len({thing.place for thing in things}) == len(scene.things)
            changed = [change_of(a, b) for a, b in zip(scene.things, things, strict=True) if a != b]
            fields = {"replace_obj": ["kind"], "replace_att": ["color", "size"]}
            fields |= {"swap_obj": ["place"], "swap_att": ["color"]}
            assert len(changed) == (1 if change.startswith("replace") else 2)
            assert all(field in fields[change] for field in changed)


def change_of(before: Thing, after: Thing) -> str:
    """Return the one field in which two things differ."""
    return only([field for field in vars(before) if getattr(before, field) != getattr(after, field)])


def test_a_near_miss_is_absent_and_shares_kind_or_color() -> None:
    for scene in SCENES:
        missed = near_miss(scene, Random(scene.name))
        assert all((missed.kind, missed.color) != (thing.kind, thing.color) for thing in scene.things)
        assert any(missed.kind == thing.kind or missed.color == thing.color for thing in scene.things)


def test_article() -> None:
    assert [article(word) for word in ("eight", "orange", "one", "circle")] == ["an", "an", "a", "a"]
