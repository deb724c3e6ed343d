"""Put scenes into words: descriptions, questions and their answers."""

from collections.abc import Mapping, Sequence
from random import Random

from another_hand.scenes import PLACES, Scene

DESCRIBE = "Describe the image."
NAME = "What is this?"
GROUP = "What kind of thing is this?"
COUNT = "How many drawings are there?"
NUMBERS = ("zero", "one", "two", "three", "four")

Exchange = tuple[str, str]  # a question and its answer


def listing(names: Sequence[str]) -> str:
    """Join names as in "fox, lemon and bus"."""
    *leading, last = names
    return f"{', '.join(leading)} and {last}" if leading else last


def description(scene: Scene) -> str:
    """Name everything in a scene in reading order, without places.

    Places would be a shortcut for the contrastive loss: which cells are filled is enough to find the image of a text.
    """
    return listing(scene.concepts) + "."


def presence(concept: str) -> str:
    """Ask whether an image shows a concept. Names in the plural need no article."""
    return f"Does the image show {with_article(concept)}?"


PLURALS = {
    "grapes",
    "cherries",
    "french fries",
    "glasses",
    "jeans",
    "scissors",
    "spaghetti",
    "sushi",
    "bread",
    "candy",
    "fire",
}


def with_article(name: str) -> str:
    """Put the article before a name that needs one."""
    if name in PLURALS:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def choice(concept: str, others: Sequence[str], rng: Random) -> Exchange:
    """Ask which of some names fits, of which one does."""
    names = rng.sample([concept, *others], 1 + len(others))
    return f"Which of these does the image show: {', '.join(names)}?", concept


def place(scene: Scene, rng: Random) -> Exchange:
    """Ask what is in a cell."""
    thing = rng.choice(scene.things)
    return f"What is at the {PLACES[thing.place]}?", thing.concept


def absent(scene: Scene, subgroups: Mapping[str, Sequence[str]], concepts: Sequence[str], rng: Random) -> str:
    """Draw a concept that a scene does not show: any one, or half of the time one of a shown one's subgroup."""
    candidates = concepts
    if rng.random() < 0.5:
        candidates = subgroups[rng.choice(scene.concepts)]
    return draw_absent(scene, candidates, concepts, rng)


def draw_absent(scene: Scene, candidates: Sequence[str], concepts: Sequence[str], rng: Random) -> str:
    """Draw a candidate that a scene does not show, or any other concept if it shows all of them."""
    left = [concept for concept in candidates if concept not in scene.concepts]
    return rng.choice(left or [concept for concept in concepts if concept not in scene.concepts])
