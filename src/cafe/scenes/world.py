"""The small world: what a scene can contain, and how scenes are drawn at random.

A scene is one to four things, each in its own quarter of the image. A thing is a drawn shape or a handwritten digit,
with a color and a size. Scenes are pure data: `draw.py` paints them and `words.py` describes them.

Two promises keep the test split honest. Every combination of (kind, color) pairs belongs to one split only, decided by
a hash, so no training image shows the objects of a test image together; and the scans of digits are divided
between the splits by their index (see `draw.py`).
"""

import hashlib
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "test"]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = SHAPES + DIGITS
COLORS = {
    "red": (226, 38, 38),
    "orange": (250, 140, 22),
    "yellow": (248, 226, 46),
    "green": (40, 170, 60),
    "cyan": (52, 212, 220),
    "blue": (44, 84, 232),
    "pink": (246, 104, 196),
}
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
TEXTURES = ("plain", "striped", "checkered")
TONES = ("dark", "gray", "light")

# Some kinds are common and some rare, and digits tend to occur with digits: without that, POPE's popular and
# adversarial probes would not differ from its random ones. There are more digits than shapes, so each is rarer.
_KIND_WEIGHTS = {kind: (0.6 if kind in DIGITS else 1.0) * (1.0 + (rank % 6) * 0.35) for rank, kind in enumerate(KINDS)}
_SAME_GROUP = 0.7  # probability that another thing is of the first one's group: digits, or shapes
_TEST_SHARE = 8  # one combination in this many belongs to the test split


@dataclass(frozen=True)
class Thing:
    """Describe one object: what it is, its color and size, and the quarter of the image it is in."""

    kind: str
    color: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """Describe the content of one image. `name` also seeds everything random about how the image is painted."""

    name: str
    split: Split
    things: tuple[Thing, ...]
    texture: str
    tone: str


def split_of(things: tuple[Thing, ...]) -> Split:
    """Return the only split in which this combination of (kind, color) pairs may appear."""
    pairs = sorted(f"{thing.color}-{thing.kind}" for thing in things)
    combination = " ".join(pairs)
    # Not `hash`, which differs from one process to the next.
    digest = hashlib.sha256(combination.encode()).digest()
    if digest[0] % _TEST_SHARE == 0:
        return "test"
    return "train"


def _draw_kinds(rng: Random, count: int) -> list[str]:
    """Draw the kinds of a scene's things: the first from all, the others mostly from its group."""
    first = _draw_kind(rng, KINDS)
    own_group, other_group = (DIGITS, SHAPES) if first in DIGITS else (SHAPES, DIGITS)
    kinds = [first]
    while len(kinds) < count:
        group = own_group if rng.random() < _SAME_GROUP else other_group
        kinds.append(_draw_kind(rng, group))
    return kinds


def _draw_kind(rng: Random, kinds: tuple[str, ...]) -> str:
    """Draw one of some kinds, by their weights."""
    weights = [_KIND_WEIGHTS[kind] for kind in kinds]
    [kind] = rng.choices(kinds, weights)
    return kind


def draw_scene(seed: int, split: Split, index: int, max_things: int = 3, min_things: int = 1) -> Scene:
    """Draw a scene: the same arguments always give the same one.

    Args:
        seed: of all scenes.
        split: which combinations of things are allowed.
        index: the scene's number in the split.
        max_things, min_things: the most and the fewest things, from one to four.
    """
    name = f"{split}-{seed}-{index:06d}"
    rng = Random(name)
    # One thing is half as likely as each other number.
    counts = range(min_things, max_things + 1)
    count_weights = [1, 2, 2, 2][min_things - 1 : max_things]
    # Draw until a scene belongs to the split.
    while True:
        [count] = rng.choices(counts, count_weights)
        places = rng.sample(PLACES, count)
        things = tuple(
            Thing(kind, rng.choice(list(COLORS)), rng.choice(SIZES), place)
            for kind, place in zip(_draw_kinds(rng, count), places, strict=True)
        )
        # Two things that share kind and color could not be told apart in words.
        different = {(thing.kind, thing.color) for thing in things}
        if len(different) == count and split_of(things) == split:
            return Scene(name, split, things, rng.choice(TEXTURES), rng.choice(TONES))


def draw_scenes(seed: int, split: Split, count: int, max_things: int = 3, distinct: bool = False) -> list[Scene]:
    """Draw scenes of a split.

    Args:
        seed: of all scenes.
        split: which combinations of things are allowed.
        count: the number of scenes.
        max_things: the most things in a scene.
        distinct: whether to leave out scenes with the same things in the same places as an earlier one.
    """
    scenes: list[Scene] = []
    seen: set[frozenset[Thing]] = set()
    index = 0
    while len(scenes) < count:
        scene = draw_scene(seed, split, index, max_things)
        index += 1
        key = frozenset(scene.things)
        if distinct and key in seen:
            continue
        seen.add(key)
        scenes.append(scene)
    return scenes
