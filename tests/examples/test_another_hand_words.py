"""Words about scenes: grammar, and that what is asked for as absent is."""

from random import Random

import pytest

from another_hand.concepts import read_list, without_words_of
from another_hand.scenes import Scene, Thing
from another_hand.words import absent, choice, description, listing, place, presence, with_article

GROUND = (255, 255, 255)
SCENE = Scene("scene", (Thing("fox", "a", 0, 40, -1), Thing("ant", "a", 3, 40, -1)), GROUND)


def test_lists_and_articles():
    assert listing(["fox"]) == "fox"
    assert listing(["fox", "bus", "ant"]) == "fox, bus and ant"
    assert description(SCENE) == "fox and ant."
    assert presence("umbrella") == "Does the image show an umbrella?"
    assert presence("scissors") == "Does the image show scissors?"


def test_every_name_has_an_article_unless_it_is_a_plural():
    names = [name for names in read_list().values() for name in names]
    bare = {name for name in names if with_article(name) == name}
    ending_in_s = {name for name in names if name.endswith("s") and not name.endswith("ss")}
    assert ending_in_s - bare <= {"octopus", "cactus", "bus"}


def test_a_place_is_asked_for_by_what_is_there():
    asked = {place(SCENE, Random(seed)) for seed in range(20)}
    assert asked == {("What is at the top left?", "fox"), ("What is at the bottom right?", "ant")}


def test_a_choice_offers_the_right_name_anywhere():
    positions = set()
    for seed in range(60):
        question, answer = choice("fox", ["bus", "ant", "key"], Random(seed))
        options = question.partition(": ")[2].rstrip("?").split(", ")
        assert sorted(options) == ["ant", "bus", "fox", "key"]
        assert answer == "fox"
        positions.add(options.index("fox"))
    assert positions == {0, 1, 2, 3}


def test_the_absent_is_never_shown_and_half_of_the_time_of_a_shown_ones_subgroup():
    subgroups = {"fox": ["fox", "wolf"], "ant": ["ant", "bee"]}
    others = [f"thing {number}" for number in range(100)]
    drawn = [absent(SCENE, subgroups, ["fox", "ant", *others], Random(seed)) for seed in range(1000)]
    assert not {"fox", "ant"} & set(drawn)
    assert 0.44 < sum(name in ("wolf", "bee") for name in drawn) / 1000 < 0.56


@pytest.mark.parametrize(
    ("name", "keywords", "kept"),
    [
        ("fox", ["Animal", "foxes", "fox face", "animal"], ["animal"]),
        ("honeybee", ["bee", "honey", "insect"], ["insect"]),
        ("fire engine", ["firetruck", "engines", "truck"], ["truck"]),
        ("grapes", ["grape", "wine"], ["wine"]),
    ],
)
def test_keywords_keep_nothing_of_the_name(name, keywords, kept):
    assert without_words_of(name, keywords) == kept
