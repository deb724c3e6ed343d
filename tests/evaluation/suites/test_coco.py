"""Objects in texts: by hand, and against CHAIR's own procedure with its own rules."""

import json
import re
from random import Random

import pytest

from cafe.errors import CafeError
from cafe.evaluation.suites.coco import ANIMALS, SYNONYMS, plural, read_captions, read_instances, vocabulary

CLASSES = [line.split(",")[0].strip() for line in SYNONYMS.strip().splitlines()]
COCO = vocabulary(CLASSES)


def test_the_80_coco_classes_are_known_and_no_synonym_names_two():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert all(COCO.mentions(f"There is a {name} here.") == [name] for name in CLASSES)
    words = [word.strip() for line in SYNONYMS.strip().splitlines() for word in line.split(",")]
    assert sorted(words) == sorted(set(words))


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("Two men and a woman's dog.", ["person", "person", "dog"]),
        ("Buses, knives, sheep, geese and puppies!", ["bus", "knife", "sheep", "bird", "dog"]),
        ("A teddy bear beside a bear", ["teddy bear", "bear"]),
        ("hot dogs and a dog", ["hot dog", "dog"]),
        ("A baby elephant follows an adult elephant.", ["elephant", "elephant"]),
        ("A baby sleeps.", ["person"]),
        ("The passenger train stands on the train tracks.", ["train"]),
        ("A toilet seat. The seat of the toilet is up.", ["toilet", "toilet"]),
        ("He wears a bow tie.", ["tie"]),
        ("A baseball bat hits the baseball at home plate.", ["baseball bat", "sports ball"]),
        ("A TV-set on the dining table, a cell-phone", ["tv", "dining table", "cell phone"]),
        ("a fire truck, a traffic light", ["truck", "traffic light"]),
        ("Carpets, catalogues and a horseshoe", []),  # whole words only
        ("", []),
    ],
)
def test_mentions_are_found_in_order_as_whole_words_the_longest_first(text, classes):
    assert COCO.mentions(text) == classes


def chair_words(text: str, synonyms: str) -> list[str]:
    """CHAIR's own steps on words already singular: pairs of words are joined, then looked up one by one."""
    lines = [[word.strip() for word in line.split(",")] for line in synonyms.strip().splitlines()]
    name = {word: line[0] for line in lines for word in line}
    joined = {word: word for word in name if word.count(" ") == 1} | {"home plate": "home plate"}
    joined |= {"train track": "train track", "bow tie": "tie", "toilet seat": "toilet"}
    for animal in ANIMALS:
        joined |= {f"baby {animal}": animal, f"adult {animal}": animal}
    joined |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
    words, found, at = re.findall(r"[a-z]+", text), [], 0
    while at < len(words):
        pair = " ".join(words[at : at + 2])
        found.append(joined.get(pair, words[at]))
        at += 2 if pair in joined else 1
    if "toilet" in found and "seat" in found:
        found = [word for word in found if word != "seat"]
    return [name[word] for word in found if word in name]


def test_with_custom_synonyms_mentions_are_those_of_chairs_own_procedure():
    synonyms = """person, man, baby, adult, passenger
chair, seat, stool
toilet, commode
train, locomotive
dog, pup
airplane, jet, air plane
tie, bow, bow tie
dining table, table
bear
teddy bear
hot dog"""
    names = [line.split(",")[0] for line in synonyms.splitlines()]
    words = sorted({word for line in synonyms.splitlines() for term in line.split(", ") for word in term.split()})
    words += ["home", "plate", "track", "passenger", "the", "of", "red"]
    known = vocabulary(names, synonyms)
    rng = Random(0)
    for _ in range(2000):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 8)))
        assert known.mentions(text) == chair_words(text, synonyms), text


def test_a_class_that_no_line_begins_with_is_named_by_its_name():
    known = vocabulary(["ring", "star"])
    assert known.classes == ("ring", "star") and known.mentions("Rings, a star, a dog") == ["ring", "star"]


@pytest.mark.parametrize(
    ("one", "many"), [("bus", "buses"), ("kitty", "kitties"), ("toy", "toys"), ("teddy bear", "teddy bears")]
)
def test_plurals_follow_the_rules_of_english(one, many):
    assert plural(one) == many


def write_instances(path, **changes):
    parsed = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}],
        "categories": [{"id": 1, "name": "dog"}, {"id": 44, "name": "bottle"}],
        "annotations": [
            {"image_id": 7, "category_id": 1},
            {"image_id": 7, "category_id": 1},
            {"image_id": 9, "category_id": 44},
        ],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(parsed | changes))
    return path


def test_instances_and_captions_are_read_as_coco_writes_them(tmp_path):
    path = write_instances(tmp_path / "annotations" / "instances_val2014.json")
    images = read_instances(path)
    assert images.names == {7: "a.png", 9: "b.png"} and images.objects == {7: {"dog"}, 9: {"bottle"}}
    captions = path.with_name("captions_val2014.json")
    said = [{"image_id": 7, "caption": "A puppy with a bottle."}, {"image_id": 3, "caption": "A dog."}]
    captions.write_text(json.dumps({"annotations": said}))
    assert read_captions(captions, images) == {7: {"dog", "bottle"}, 9: set()}
    assert list(read_instances(path, 1).names) == [7]
    path.with_name("synonyms.txt").write_text("dog, hound\nbottle, flask, \n")
    assert read_instances(path).vocabulary.mentions("Hounds, a flask, a puppy") == ["dog", "bottle"]


@pytest.mark.parametrize(
    "changes", [{"images": []}, {"categories": None}, {"annotations": [{"image_id": 7}]}, {"images": [{"id": 1}]}]
)
def test_a_file_that_is_not_cocos_is_named(tmp_path, changes):
    path = write_instances(tmp_path / "annotations" / "instances_x.json", **changes)
    with pytest.raises(CafeError, match="instances_x"):
        read_instances(path)
