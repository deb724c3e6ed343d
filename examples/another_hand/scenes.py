"""Compose scenes of one to four drawings, and decide which concepts stand together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from tqdm import tqdm

CELL = 48  # pixels; a scene is two cells wide and two high
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUM_PAIRS = 40
TOGETHER = 0.8  # of the training scenes that show one of a pair also show the other


@dataclass(frozen=True)
class Thing:
    """Hold one drawing of a scene: what it shows, whose it is, where it stands and how large it is."""

    concept: str
    hand: str
    place: int  # in `PLACES`
    size: int  # pixels
    variant: int  # number of the augmented variant; -1 for the drawing as it is


@dataclass(frozen=True)
class Scene:
    """Hold a scene in reading order; one with `single` set is one drawing that fills a small image."""

    name: str
    things: tuple[Thing, ...]
    ground: tuple[int, int, int]
    single: bool = False

    @property
    def concepts(self) -> tuple[str, ...]:
        """List what the scene shows, in reading order."""
        return tuple(thing.concept for thing in self.things)


def pair_up(concepts: Sequence[str], seed: int = 0) -> dict[str, str]:
    """Draw the pairs that stand together in training, as a mapping both ways; fork and knife go with pizza."""
    rest = [concept for concept in concepts if concept not in ("fork and knife", "pizza")]
    chosen = Random(f"pairs {seed}").sample(rest, 2 * NUM_PAIRS - 2)
    pairs = [("fork and knife", "pizza"), *zip(chosen[::2], chosen[1::2], strict=True)]
    return {first: second for pair in pairs for first, second in (pair, pair[::-1])}


def draw_concepts(rng: Random, concepts: Sequence[str], partners: Mapping[str, str], count: int) -> list[str]:
    """Draw different concepts for a training scene: four in five of those with a partner bring it along."""
    shown: list[str] = []
    while len(shown) < count:
        concept = rng.choice(concepts)
        if concept in shown:
            continue
        shown.append(concept)
        partner = partners.get(concept)
        if partner and partner not in shown and len(shown) < count and rng.random() < TOGETHER:
            shown.append(partner)
    return shown


def draw_concepts_apart(rng: Random, concepts: Sequence[str], partners: Mapping[str, str], count: int) -> list[str]:
    """Draw different concepts for a test scene, none of which has its partner there."""
    shown: list[str] = []
    while len(shown) < count:
        concept = rng.choice(concepts)
        if concept not in shown and partners.get(concept) not in shown:
            shown.append(concept)
    return shown


def compose(
    name: str, rng: Random, concepts: Sequence[str], hands: Mapping[str, Sequence[str]], variants: int = 0
) -> Scene:
    """Place concepts in random cells.

    Args:
        name: the scene's.
        rng: draws everything else.
        concepts: one to four, in random order.
        hands: by concept, the hands that may draw it.
        variants: number of augmented variants to draw from; 0 takes the drawings as they are.
    """
    places = sorted(rng.sample(range(4), len(concepts)))
    things = []
    for concept, place in zip(rng.sample(list(concepts), len(concepts)), places, strict=True):
        variant = rng.randrange(variants) if variants else -1
        things.append(Thing(concept, rng.choice(hands[concept]), place, rng.randint(34, CELL), variant))
    return Scene(name, tuple(things), draw_ground(rng))


def single(name: str, rng: Random, concept: str, hand: str, variants: int = 0) -> Scene:
    """Make the small image of one drawing."""
    variant = rng.randrange(variants) if variants else -1
    return Scene(name, (Thing(concept, hand, 0, CELL, variant),), draw_ground(rng), single=True)


def draw_ground(rng: Random) -> tuple[int, int, int]:
    """Draw the color of a ground: white, or a pastel."""
    if rng.random() < 0.3:
        return (255, 255, 255)
    return (rng.randint(200, 255), rng.randint(200, 255), rng.randint(200, 255))


# By hand and concept: (variants + 1, side, side, 4), the last unchanged.
Drawings = Mapping[tuple[str, str], np.ndarray]


def paint(scene: Scene, drawings: Drawings) -> Image.Image:
    """Paint a scene: 96 pixels wide, or 48 if it is a single drawing."""
    side = CELL if scene.single else 2 * CELL
    image = Image.new("RGB", (side, side), scene.ground)
    rng = Random(f"offsets {scene.name}")
    for thing in scene.things:
        drawing = Image.fromarray(drawings[thing.hand, thing.concept][thing.variant])
        if thing.size != drawing.width:
            drawing = drawing.resize((thing.size, thing.size), Image.Resampling.BILINEAR)
        row, column = divmod(thing.place, 2)
        slack = CELL - thing.size
        left, top = column * CELL + rng.randint(0, slack), row * CELL + rng.randint(0, slack)
        image.paste(drawing, (left, top), drawing)
    return image


def image_path(scene: Scene) -> str:
    """Return the path of a scene's image, relative to the folder that it is written to."""
    return f"images/{scene.name}.png"


def paint_all(scenes: Sequence[Scene], drawings: Drawings, directory: Path) -> None:
    """Write the images of scenes."""
    (directory / "images").mkdir(parents=True)
    for scene in tqdm(scenes, desc=f"{directory.name} images", unit="image"):
        paint(scene, drawings).save(directory / image_path(scene))
