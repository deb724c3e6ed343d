"""Make the training records: descriptions and questions in LLaVA's format, single drawings with texts as pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from another_hand.annotations import count_concepts
from another_hand.concepts import Concept, training_hands
from another_hand.retrieval import texts
from another_hand.scenes import Scene, compose, draw_concepts, image_path, pair_up, single
from another_hand.words import (
    COUNT,
    DESCRIBE,
    GROUP,
    NAME,
    NUMBERS,
    Exchange,
    absent,
    choice,
    description,
    draw_absent,
    listing,
    place,
    presence,
)

Record = dict[str, Any]
WRONG_OPTIONS = 3
RESOLUTION = 4


def draw_training_scenes(concepts: Sequence[Concept], count: int, variants: int, seed: int) -> list[Scene]:
    """Draw training scenes of one to four concepts by the training hands, in which partners stand together."""
    hands = training_hands(concepts)
    names = list(hands)
    partners = pair_up(names)
    scenes = []
    for number in range(count):
        rng = Random(f"train {seed} {number}")
        shown = draw_concepts(rng, names, partners, rng.randint(1, 4))
        scenes.append(compose(f"scene-{number:05}", rng, shown, hands, variants))
    return scenes


def draw_training_singles(concepts: Sequence[Concept], count: int, variants: int, seed: int) -> list[Scene]:
    """Draw single drawings by the training hands, each concept as often as any other, give or take one."""
    hands = training_hands(concepts)
    rng = Random(f"singles {seed}")
    names: list[str] = []
    while len(names) < count:
        names += rng.sample(list(hands), len(hands))
    return [
        single(f"single-{number:05}", rng, name, rng.choice(hands[name]), variants)
        for number, name in enumerate(names[:count])
    ]


def name(scene: Scene, concepts: Mapping[str, Concept], seed: int) -> Record:
    """Make a pair of a single drawing and one of several texts, with the question for its name as a dialogue."""
    (concept,) = scene.concepts
    record = _llava(scene, [(NAME, concept)])
    positive = texts(concepts[concept], Random(f"texts {seed} {scene.name}"))
    return {**record, "query_image": record["image"], "positive": positive}


@dataclass(frozen=True)
class Frequencies:
    """Hold concepts as often as training images show them, so that what is absent is asked for as often as what is not.

    Attributes:
        concepts: each several times, in proportion to the images that show it.
        subgroups: by concept, those of its subgroup, likewise.
        groups: by concept, the name of its group.
    """

    concepts: Sequence[str]
    subgroups: Mapping[str, Sequence[str]]
    groups: Mapping[str, str]


def frequencies(concepts: Sequence[Concept], scenes: Sequence[Scene]) -> Frequencies:
    """Count how often scenes show each seen concept, about `RESOLUTION` times on average."""
    counts = count_concepts(scenes)
    mean = sum(counts.values()) / sum(concept.seen for concept in concepts)
    repeated = [c for c in concepts if c.seen for _ in range(max(1, round(RESOLUTION * counts[c.name] / mean)))]
    seen = dict.fromkeys(repeated)
    return Frequencies(
        concepts=[concept.name for concept in repeated],
        subgroups={c.name: [other.name for other in repeated if other.subgroup == c.subgroup] for c in seen},
        groups={c.name: c.group for c in seen},
    )


def describe(scene: Scene, drawn: Frequencies, seed: int) -> Record:
    """Make a LLaVA record with the description, which is also what the contrast matches with the image.

    Its hard negative is a false description, in which one concept is another of its subgroup.
    """
    rng = Random(f"negatives {seed} {scene.name}")
    wrong = rng.choice(scene.concepts)
    other = draw_absent(scene, drawn.subgroups[wrong], drawn.concepts, rng)
    named = listing([other if concept == wrong else concept for concept in scene.concepts])
    return {**_llava(scene, [(DESCRIBE, description(scene))]), "negatives": [f"{named}."]}


def ask(scene: Scene, drawn: Frequencies, seed: int) -> Record:
    """Make a LLaVA record with questions alone, none of which says anything about the answer of a later one."""
    rng = Random(f"questions {seed} {scene.name}")
    exchanges = _about_single(scene, drawn, rng) if scene.single else _about_scene(scene, drawn, rng)
    return _llava(scene, exchanges)


def _about_single(scene: Scene, drawn: Frequencies, rng: Random) -> list[Exchange]:
    """Ask for the group and then the name, half of the time; otherwise one question, which would tell the group."""
    (name,) = scene.concepts
    if rng.random() < 0.5:
        return [(GROUP, drawn.groups[name]), (NAME, name)]
    if rng.random() < 0.5:
        return [_ask_presence(scene, drawn, rng)]
    return [_ask_choice(scene, name, drawn, set(), rng)]


def _about_scene(scene: Scene, drawn: Frequencies, rng: Random) -> list[Exchange]:
    """Ask for presence, and then two of a choice, a place and the number; a concept is named by one question only.

    Presence comes first: after other questions, a concept that nobody has named yet would more often be absent.
    """
    exchanges = [_ask_presence(scene, drawn, rng)]
    for kind in rng.sample(["choice", "place", "count"], 2):
        named = _named(exchanges, drawn)
        hidden = [thing for thing in scene.things if thing.concept not in named]
        if kind == "count":
            exchanges.append((COUNT, NUMBERS[len(scene.things)]))
        elif hidden and kind == "choice":
            exchanges.append(_ask_choice(scene, rng.choice(hidden).concept, drawn, named, rng))
        elif hidden:
            exchanges.append(place(replace(scene, things=tuple(hidden)), rng))
    return exchanges


def _ask_presence(scene: Scene, drawn: Frequencies, rng: Random) -> Exchange:
    """Ask for a concept that a scene shows or, as often, for one that it does not."""
    if rng.random() < 0.5:
        return presence(rng.choice(scene.concepts)), "yes"
    return presence(absent(scene, drawn.subgroups, drawn.concepts, rng)), "no"


def _ask_choice(scene: Scene, right: str, drawn: Frequencies, named: set[str], rng: Random) -> Exchange:
    """Ask which of four is shown; the wrong ones are drawn as the absent ones of presence are."""
    wrong: list[str] = []
    while len(wrong) < WRONG_OPTIONS:
        other = absent(scene, drawn.subgroups, drawn.concepts, rng)
        if other not in wrong and other not in named:
            wrong.append(other)
    return choice(right, wrong, rng)


def _named(exchanges: Sequence[Exchange], drawn: Frequencies) -> set[str]:
    """List the concepts that questions or answers name, also as a part of another's name."""
    said = " ".join(f"{question} {answer}" for question, answer in exchanges)
    return {name for name in drawn.groups if name in said}


def _llava(scene: Scene, exchanges: Sequence[Exchange]) -> Record:
    """Make a LLaVA record, with the image in its first turn."""
    turns = []
    for number, (question, answer) in enumerate(exchanges):
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": scene.name, "image": image_path(scene), "conversations": turns}
