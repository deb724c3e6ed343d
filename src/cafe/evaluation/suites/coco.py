"""Objects in pictures as COCO's annotations have them, and the words of a text that name objects.

CHAIR and THRONE judge descriptions by these. The words for COCO's 80 classes are ours: what a class is commonly called,
in the singular. CHAIR's authors keep a longer list (github.com/LisaAnne/Hallucination, data/synonyms.txt, one class a
line, its name first); as `annotations/synonyms.txt` it takes the place of ours.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cafe.errors import CafeError
from cafe.evaluation.suite import find_one

SYNONYMS = """
person, people, man, woman, boy, girl, child, kid, baby, toddler, adult, teenager, lady, gentleman, guy
bicycle, bike
car, sedan, van, minivan, suv, taxi, cab, jeep
motorcycle, motorbike, moped, scooter
airplane, plane, aeroplane, aircraft, jet, airliner
bus, minibus
train, locomotive
truck, lorry, pickup, pickup truck, fire truck, firetruck
boat, ship, sailboat, canoe, kayak, ferry, yacht, rowboat, motorboat
traffic light, traffic signal, stoplight, stop light
fire hydrant, hydrant
stop sign
parking meter
bench
bird, duck, goose, seagull, gull, pigeon, parrot, owl, swan, crow, sparrow, eagle, pelican, flamingo, rooster, hen
cat, kitten, kitty
dog, puppy
horse, pony, foal, mare, stallion
sheep, lamb, ewe
cow, cattle, bull, calf, ox
elephant
bear
zebra
giraffe
backpack, rucksack, knapsack
umbrella, parasol
handbag, purse
tie, necktie, bow tie
suitcase, luggage
frisbee
skis, ski
snowboard
sports ball, ball, soccer ball, football, basketball, baseball, tennis ball, volleyball
kite
baseball bat
baseball glove, mitt
skateboard
surfboard
tennis racket, racket, racquet
bottle
wine glass, wineglass
cup, mug, teacup
fork
knife
spoon
bowl
banana
apple
sandwich, hamburger, burger, cheeseburger
orange
broccoli
carrot
hot dog, hotdog
pizza
donut, doughnut
cake, cupcake, cheesecake
chair, armchair, stool
couch, sofa, loveseat
potted plant, houseplant
bed
dining table, table
toilet
tv, television, monitor
laptop, laptop computer, notebook computer
mouse, computer mouse
remote, remote control
keyboard
cell phone, cellphone, mobile phone, smartphone, phone, telephone
microwave, microwave oven
oven, stove
toaster
sink, washbasin
refrigerator, fridge
book
clock
vase
scissors
teddy bear, teddy, stuffed bear
hair drier, hair dryer, hairdryer
toothbrush
"""

IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "person": "persons", "gentleman": "gentlemen",
    "goose": "geese", "mouse": "mice", "knife": "knives", "calf": "calves", "ox": "oxen",
}  # fmt: skip
# CHAIR's special cases: before these a word for a person names none, and these compounds hold no object, or another.
AGES = ("baby", "adult")
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
COMPOUNDS = {"home plate": None, "train track": None, "toilet seat": "toilet", "bow tie": "tie"}
MAX_NEW_TOKENS = 3  # words of a term


@dataclass(frozen=True)
class Vocabulary:
    """Which words name which class.

    Attributes:
        classes: their names.
        words: from one or more words to the class they name; None for words that only look like an object.
    """

    classes: tuple[str, ...]
    words: dict[str, str | None]

    def mentions(self, text: str) -> list[str]:
        """The class of each mention of an object in a text, in order; the longest words that name one are taken."""
        words = re.findall(r"[a-z0-9]+", text.lower().replace("'s ", " "))
        found: list[str] = []
        at = 0
        while at < len(words):
            for length in range(min(MAX_NEW_TOKENS, len(words) - at), 0, -1):
                term = " ".join(words[at : at + length])
                if term in self.words:
                    name = self.words[term]
                    # "The seat of the toilet" is no chair.
                    if name and not (term in ("seat", "seats") and "toilet" in words):
                        found.append(name)
                    break
            at += length
        return found


def vocabulary(classes: Iterable[str], synonyms: str = SYNONYMS) -> Vocabulary:
    """The words for some classes, in the singular and the plural.

    Args:
        classes: names; one that begins no line of the synonyms is named by its name alone.
        synonyms: lines of words with commas between, of which the first is the class's name.
    """
    lines = [[word.strip().lower() for word in line.split(",")] for line in synonyms.splitlines() if line.strip()]
    known = {line[0]: line for line in lines}
    names = tuple(classes)
    words: dict[str, str | None] = {
        word: name for name in names for word in known.get(name.lower(), [name.lower()]) if word
    }
    for compound, head in COMPOUNDS.items():
        words.setdefault(compound, words.get(head or ""))
    for word in list(words):
        words.setdefault(plural(word), words[word])
    for qualifiers, heads in ((AGES, ANIMALS), (("passenger",), ("jet", "train"))):
        for head in heads:
            for form in (head, plural(head)):
                words |= {f"{qualifier} {form}": words.get(form) for qualifier in qualifiers}
    return Vocabulary(names, words)


def plural(term: str) -> str:
    """The regular plural of a term's last word, and that of the irregular ones among COCO's."""
    head, _, word = term.rpartition(" ")
    if word in IRREGULAR:
        many = IRREGULAR[word]
    elif re.search(r"(s|x|z|ch|sh)$", word):
        many = word + "es"
    elif re.search(r"[^aeiou]y$", word):
        many = word[:-1] + "ies"
    else:
        many = word + "s"
    return f"{head} {many}".strip()


@dataclass(frozen=True)
class ImageRefs:
    """Pictures of which all objects are known.

    Attributes:
        source: the annotation file.
        names: of the pictures' files, by id.
        objects: of each picture, the classes it shows.
        vocabulary: all classes, and the words for them.
        prompt: what the file says to ask for a description; empty where it does not.
    """

    source: Path
    names: dict[int, str]
    objects: dict[int, set[str]]
    vocabulary: Vocabulary
    prompt: str


def find_instances(data: Path, first: str) -> Path | None:
    """The annotation file of a year, such as "val2014"; or the only one there is."""
    return find_one(data, f"annotations/instances_{first}.json") or find_one(data, "annotations/instances_*.json")


def read_instances(path: Path, limit: int | None = None) -> ImageRefs:
    """COCO's `instances_*.json`: the first `limit` pictures and the classes that each shows.

    `annotations/synonyms.txt`, where it is there, says which words name which class.

    Raises:
        CafeError: the file is not of its format.
    """
    try:
        parsed: dict[str, Any] = json.loads(path.read_text())
        classes = {row["id"]: row["name"] for row in parsed["categories"]}
        names = {row["id"]: row["file_name"] for row in parsed["images"][:limit]}
        objects: dict[int, set[str]] = {number: set() for number in names}
        for row in parsed["annotations"]:
            if row["image_id"] in objects:
                objects[row["image_id"]].add(classes[row["category_id"]])
    except (ValueError, KeyError, TypeError) as error:
        raise CafeError(f"The evaluation file {path} is not a COCO instances file: {error!r}.") from None
    if not names or not classes:
        raise CafeError(f"The evaluation file {path} holds no picture or no category.")
    file = path.with_name("synonyms.txt")
    words = vocabulary(classes.values(), file.read_text() if file.is_file() else SYNONYMS)
    return ImageRefs(path, names, objects, words, (parsed.get("info") or {}).get("prompt", ""))


def read_captions(path: Path, pictures: ImageRefs) -> dict[int, set[str]]:
    """COCO's `captions_*.json`: the classes that the captions of each picture mention.

    Raises:
        CafeError: the file is not of its format.
    """
    said: dict[int, set[str]] = {number: set() for number in pictures.names}
    try:
        for row in json.loads(path.read_text())["annotations"]:
            if row["image_id"] in said:
                said[row["image_id"]].update(pictures.vocabulary.mentions(row["caption"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CafeError(f"The evaluation file {path} is not a COCO captions file: {error!r}.") from None
    return said
