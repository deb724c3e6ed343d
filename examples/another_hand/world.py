"""Draw everything that training shows, in all its variants, once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch

from another_hand.augment import augment
from another_hand.concepts import GROUPS, TRAINING_HANDS, Concept, training_hands
from another_hand.drawings import SIDE, Drawing, draw
from another_hand.scenes import CELL, PLACES, Drawings, pair_up
from another_hand.words import COUNT, DESCRIBE, GROUP, NAME, NUMBERS, listing, presence

VARIANTS = 24


@dataclass(frozen=True)
class World:
    """Hold what lessons are drawn from.

    Attributes:
        concepts: those that training shows.
        subgroups: by concept, the concepts of its subgroup.
        groups: by concept, the name of its group.
        partners: by concept, the one that stands with it in training, if there is one.
        hands: by concept, the training hands that drew it.
        drawings: by hand and concept, the augmented variants and the drawing itself.
        variants: number of augmented variants of each drawing.
    """

    concepts: Sequence[str]
    subgroups: Mapping[str, Sequence[str]]
    groups: Mapping[str, str]
    partners: Mapping[str, str]
    hands: Mapping[str, Sequence[str]]
    drawings: Drawings
    variants: int

    def few(self, count: int, seed: int) -> "World":
        """Return the same world with only some of its concepts."""
        concepts = Random(f"few {seed}").sample(list(self.concepts), count)
        subgroups = {name: [other for other in self.subgroups[name] if other in concepts] for name in concepts}
        return replace(self, concepts=concepts, subgroups=subgroups)


def make_world(packages: Path, concepts: Sequence[Concept], variants: int = VARIANTS) -> World:
    """Draw the seen concepts by the training hands, with augmented variants."""
    seen = [concept for concept in concepts if concept.seen]
    drawings = draw_variants(packages, seen, variants)
    names = [concept.name for concept in seen]
    return World(
        concepts=names,
        subgroups={c.name: [other.name for other in seen if other.subgroup == c.subgroup] for c in seen},
        groups={c.name: c.group for c in seen},
        partners=pair_up(names),
        hands=training_hands(seen),
        drawings=drawings,
        variants=variants,
    )


def draw_variants(packages: Path, concepts: Sequence[Concept], variants: int) -> Drawings:
    """Draw concepts by the training hands, as augmented variants and, last, as they are."""
    drawings = {}
    for number, hand in enumerate(TRAINING_HANDS):
        drawn = draw(packages, hand, concepts)
        generator = torch.Generator().manual_seed(number)
        stack = torch.from_numpy(np.stack(list(drawn.values()))).permute(0, 3, 1, 2)
        made = [augment(stack, CELL, generator).permute(0, 2, 3, 1).numpy() for _ in range(variants)]
        for index, (name, drawing) in enumerate(drawn.items()):
            drawings[hand, name] = np.stack([*(variant[index] for variant in made), shrink(drawing)])
    return drawings


def shrink(drawing: Drawing) -> Drawing:
    """Make a drawing as small as a cell, with its colors weighted by their opacity."""
    planes = drawing.astype(np.float32) / 255
    planes[..., :3] *= planes[..., 3:]
    factor = SIDE // CELL
    planes = planes.reshape(CELL, factor, CELL, factor, 4).mean(axis=(1, 3))
    planes[..., :3] /= np.maximum(planes[..., 3:], 1e-3)
    return np.round(255 * planes).clip(0, 255).astype(np.uint8)


def plain_drawings(packages: Path, hands: Iterable[str], concepts: Sequence[Concept]) -> Drawings:
    """Draw concepts as they are, without variants."""
    return {
        (hand, name): shrink(drawing)[None]
        for hand in hands
        for name, drawing in draw(packages, hand, concepts).items()
    }


def corpus(concepts: Iterable[Concept]) -> Iterator[str]:
    """Yield the texts that the tokenizer is trained on; names come often, so that each word becomes one token."""
    for concept in concepts:
        yield from [presence(concept.name), f" {concept.name},", listing([concept.name, concept.name]) + "."] * 20
        yield ", ".join(concept.keywords)
        yield from concept.foreign.values()
    yield from [DESCRIBE, NAME, GROUP, COUNT, *GROUPS.values(), *NUMBERS, "Which of these does the image show:"] * 20
    yield from [f"What is at the {place}?" for place in PLACES] * 20
    yield from ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "yes", "no"] * 20
    yield from ["Compress this image in one word:", "Compress this sentence in one word:"] * 20
