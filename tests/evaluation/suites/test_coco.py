"""Objects in texts: by hand, and against CHAIR's own procedure with its own rules."""

import json
from random import Random

import pytest

from cafe.errors import CafeError
from cafe.evaluation.suites.coco import ANIMALS, SYNONYMS, plurals, read_captions, read_instances, vocabulary

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
        ("A baseball bat hits the ball at home plate.", ["baseball bat", "sports ball"]),
        ("A TV set on the dining table, a cell phone", ["tv", "dining table", "cell phone"]),
        ("A man-made lake, a dog-friendly park, a man/woman", []),  # a hyphen makes one word of two
        ("At home, plates; a teddy, bears", ["bear"]),  # a comma keeps two apart
        ("Policemen, gentlemen, grandchildren and thieves", ["person"] * 4),
        ("A policeman, a grandchild and a thief", ["person"] * 3),
        ("Pocketknives, a knife, calves, oxen, mice and buffaloes", ["knife", "knife", "cow", "cow", "mouse", "cow"]),
        ("wine glasses, stop signs, train tracks, bow ties", ["wine glass", "stop sign", "tie"]),
        ("red motor bikes and motor cycles", ["motorcycle", "motorcycle"]),
        ("a fire truck, a traffic light", ["truck", "traffic light"]),
        ("Carpets, catalogues and a horseshoe", []),  # whole words only
        ("", []),
    ],
)
def test_mentions_are_found_in_order_as_whole_words_the_longest_first(text, classes):
    assert COCO.mentions(text) == classes


PAIRS = """motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant,
stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass, hot dog,
cell phone, mobile phone, teddy bear, hair drier, potted plant, bow tie, laptop computer, home plate, train track"""


def chair_words(text: str, synonyms: str, singular: dict[str, str]) -> list[str]:
    """CHAIR's own steps: words in the singular, pairs of them joined, and each looked up."""
    lines = [[word.strip() for word in line.split(",")] for line in synonyms.strip().splitlines()]
    name = {word: line[0] for line in lines for word in line}
    joined = {pair: pair for pair in " ".join(PAIRS.split()).split(", ")}
    for animal in ANIMALS:
        joined |= {f"baby {animal}": animal, f"adult {animal}": animal}
    joined |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
    joined |= {"bow tie": "tie", "toilet seat": "toilet"}
    words, found, at = [singular.get(word, word) for word in text.split()], [], 0
    while at < len(words):
        pair = " ".join(words[at : at + 2])
        found.append(joined.get(pair, words[at]))
        at += 2 if pair in joined else 1
    if "toilet" in found and "seat" in found:
        found = [word for word in found if word != "seat"]
    return [name[word] for word in found if word in name]


# True sentences about images, with what the images show. The authors' code counts what is in the middle.
TRUE_SENTENCES = [
    ("A baseball player stands at home plate", ["person"], {"person"}),
    ("A red motor bike beside two policemen", ["motorcycle", "person"], {"motorcycle", "person"}),
    ("The football player's grandchildren eat cupcakes with knives", ["person", "person", "cake", "knife"],
     {"person", "cake", "knife"}),
    ("A man-made lake by the train tracks, a baby elephant drinks", ["elephant"], {"elephant"}),
    ("The seat of the toilet is up; a policeman reads at the notebook", ["toilet", "person", "laptop"],
     {"toilet", "person", "laptop"}),
]  # fmt: skip


def test_true_sentences_hallucinate_nothing():
    for sentence, mentioned, present in TRUE_SENTENCES:
        assert COCO.mentions(sentence) == mentioned
        assert set(mentioned) <= present


def test_with_the_authors_list_mentions_are_those_of_their_own_procedure():
    singular = {"people": "person", "men": "man", "knives": "knife", "policemen": "policeman", "dogs": "dog"}
    singular |= {"glasses": "glass", "tracks": "track", "bikes": "bike", "seats": "seat", "ties": "tie", "buses": "bus"}
    terms = [word.strip() for line in SYNONYMS.strip().splitlines() for word in line.split(",")]
    # The words of their list that their own code never finds, for the way it is written.
    terms = [term for term in terms if term not in ("stove top oven", "iphone")]
    special = [word for pair in " ".join(PAIRS.split()).split(", ") for word in pair.split()]
    words = sorted({*terms, *special, *singular, "passenger", "baby", "adult", "cub", "the", "of", "red", "plate"})
    rng = Random(0)
    for _ in range(3000):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 10)))
        assert COCO.mentions(text) == chair_words(text, SYNONYMS, singular), text


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
        assert known.mentions(text) == chair_words(text, synonyms, {}), text


def test_a_class_that_no_line_begins_with_is_named_by_its_name():
    known = vocabulary(["ring", "star"])
    assert known.classes == ("ring", "star") and known.mentions("Rings, a star, a dog") == ["ring", "star"]


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("bus", "buses"),
        ("kitty", "kitties"),
        ("toy", "toys"),
        ("bear", "bears"),
        ("woman", "women"),
        ("human", "humans"),
    ],
)
def test_plurals_follow_the_rules_of_english(one, many):
    assert many in plurals(one)


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
