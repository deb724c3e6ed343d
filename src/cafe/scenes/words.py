"""Describe a scene: captions, paragraphs, questions with answers and hard negatives, all of them exact.

Everything follows from the `Scene` alone, so a program can check any sentence that a model generates about an image.
"""

from dataclasses import dataclass, replace
from itertools import islice, pairwise, permutations
from random import Random

from cafe.scenes.world import COLORS, KINDS, PLACES, SIZES, Scene, Thing

CAPTION_PROMPT = "Describe the image."
PARAGRAPH_PROMPT = "Describe the image in detail."
NUMBERS = ("zero", "one", "two", "three", "four")
QUESTION_KINDS = ("presence", "count", "color", "shape", "place", "relation")


@dataclass(frozen=True)
class Question:
    """Ask about one image, with the only right answer; `kind` is one of `QUESTION_KINDS`."""

    kind: str
    text: str
    answer: str


def article(word: str) -> str:
    """Return "a" or "an", whichever the following word needs."""
    return "an" if word[0] in "aeiou" and word != "one" else "a"


def name(thing: Thing) -> str:
    """Return the shortest name that identifies a thing in its scene, e.g. "red circle"."""
    return f"{thing.color} {thing.kind}"


def _full(thing: Thing) -> str:
    return f"a {thing.size} {thing.color} {thing.kind}"


def _join(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _template_at(things: tuple[Thing, ...]) -> str:
    return _join([f"{_full(thing)} at the {thing.place}" for thing in things]) + "."


def caption_by_place(things: tuple[Thing, ...]) -> str:
    """Write the caption that names each place before the thing that is there."""
    return ", ".join(f"{thing.place}: {_full(thing)}" for thing in things) + "."


def _template_there_is(things: tuple[Thing, ...]) -> str:
    return "there is " + _join([f"{_full(thing)} in the {thing.place}" for thing in things]) + "."


_IN_READING_ORDER = 0.9  # of the captions
_CAPTION_TEMPLATES = (_template_at, caption_by_place, _template_there_is)


def in_reading_order(things: tuple[Thing, ...]) -> tuple[Thing, ...]:
    """Sort things row by row, from the left."""
    return tuple(sorted(things, key=lambda thing: PLACES.index(thing.place)))


def captions(things: tuple[Thing, ...], orders: int | None = None) -> list[str]:
    """Write every true short caption: each template with the things in each order, or in the first `orders` of them."""
    return [template(order) for template in _CAPTION_TEMPLATES for order in islice(permutations(things), orders)]


def caption(things: tuple[Thing, ...], rng: Random) -> str:
    """Write one of `captions` at random; most are in reading order, as those of people."""
    return captions_alike(things, things, rng)[0]


def captions_alike(things: tuple[Thing, ...], others: tuple[Thing, ...], rng: Random) -> tuple[str, str]:
    """Write captions of things and of their changed versions, in the same order and with the same template."""
    template = rng.choice(_CAPTION_TEMPLATES)
    order = rng.sample(things, len(things)) if rng.random() > _IN_READING_ORDER else in_reading_order(things)
    changed = dict(zip(things, others, strict=True))
    return template(tuple(order)), template(tuple(changed[thing] for thing in order))


def paragraph(scene: Scene, rng: Random) -> str:
    """Write a caption of several sentences that also describes the background and counts the things."""
    things = rng.sample(scene.things, len(scene.things))
    noun = "object" if len(things) == 1 else "objects"
    sentences = [f"The picture shows {NUMBERS[len(things)]} {noun} on a {scene.texture} {scene.tone} background."]
    for thing in things:
        form = rng.choice(("At the {place} there is {full}.", "In the {place} stands {full}."))
        sentences.append(form.format(place=thing.place, full=_full(thing)))
    for first, second in pairwise(things):
        relation = relation_between(first, second)
        if relation:
            sentences.append(f"The {name(first)} is {relation} the {name(second)}.")
    return " ".join(sentences)


def relation_between(first: Thing, second: Thing) -> str | None:
    """Return where the first thing is relative to the second; None unless they share a row or a column."""
    (row, column), (other_row, other_column) = (divmod(PLACES.index(thing.place), 2) for thing in (first, second))
    if row == other_row:
        return "left of" if column < other_column else "right of"
    if column == other_column:
        return "above" if row < other_row else "below"
    return None


def questions(scene: Scene, rng: Random) -> list[Question]:
    """Ask one question of every kind that the scene allows, in a fixed order of kinds."""
    target = rng.choice(scene.things)
    asked = [
        _presence_question(scene, target, rng),
        _count_question(scene, target, rng),
        _color_question(scene, target),
        _shape_question(scene, target),
        Question("place", f"Where is the {name(target)}?", target.place),
    ]
    relation = _relation_question(scene, rng)
    return [*asked, relation] if relation else asked


def _presence_question(scene: Scene, target: Thing, rng: Random) -> Question:
    """Ask for a color and kind, or for a kind alone; half of the time for one that is absent."""
    present = rng.random() < 0.5
    answer = _yes_no(present)
    if rng.random() < 0.5:
        subject = name(target if present else near_miss(scene, rng))
        return Question("presence", f"Is there {article(subject)} {subject}?", answer)
    shown = {thing.kind for thing in scene.things}
    subject = target.kind if present else rng.choice([kind for kind in KINDS if kind not in shown])
    return Question("presence", f"Is there {article(subject)} {subject} in the image?", answer)


def _count_question(scene: Scene, target: Thing, rng: Random) -> Question:
    """Ask for the number of all things, or of those that have the target's color."""
    if rng.random() < 0.5:
        return Question("count", "How many objects are there?", NUMBERS[len(scene.things)])
    same = sum(thing.color == target.color for thing in scene.things)
    return Question("count", f"How many {target.color} objects are there?", NUMBERS[same])


def _color_question(scene: Scene, target: Thing) -> Question:
    """Ask for the target's color, by its kind where that identifies it and by its place elsewhere."""
    if sum(thing.kind == target.kind for thing in scene.things) == 1:
        return Question("color", f"What color is the {target.kind}?", target.color)
    return Question("color", f"What color is the object at the {target.place}?", target.color)


def _shape_question(scene: Scene, target: Thing) -> Question:
    """Ask for the target's kind, by its color where that identifies it and by its place elsewhere."""
    if sum(thing.color == target.color for thing in scene.things) == 1:
        return Question("shape", f"What is the {target.color} object?", target.kind)
    return Question("shape", f"What is the object at the {target.place}?", target.kind)


def _relation_question(scene: Scene, rng: Random) -> Question | None:
    """Ask what is beside, above or below a thing; None where no two things share a row or a column."""
    related = []
    for first, second in permutations(scene.things, 2):
        if relation := relation_between(first, second):
            related.append((first, second, relation))
    if not related:
        return None
    first, second, relation = rng.choice(related)
    return Question("relation", f"What is {relation} the {name(second)}?", name(first))


def _yes_no(true: bool) -> str:
    return "yes" if true else "no"


def near_miss(scene: Scene, rng: Random) -> Thing:
    """Draw a thing that is not in the scene but shares its kind or its color with one that is."""
    present = {name(thing) for thing in scene.things}
    while True:
        thing = rng.choice(scene.things)
        if rng.random() < 0.5:
            thing = replace(thing, color=rng.choice(list(COLORS)))
        else:
            thing = replace(thing, kind=rng.choice(KINDS))
        if name(thing) not in present:
            return thing


def swap_attributes(things: tuple[Thing, ...], rng: Random) -> tuple[Thing, ...] | None:
    """Exchange the colors of two things; None where no two differ in color."""
    return _swap(things, "color", rng)


def swap_places(things: tuple[Thing, ...], rng: Random) -> tuple[Thing, ...] | None:
    """Exchange the places of two things; None where there is only one."""
    return _swap(things, "place", rng)


def _swap(things: tuple[Thing, ...], field: str, rng: Random) -> tuple[Thing, ...] | None:
    """Exchange the values of a field between two random things that differ in it; None where there are none."""
    pairs = [
        (i, j)
        for i, j in permutations(range(len(things)), 2)
        if i < j and getattr(things[i], field) != getattr(things[j], field)
    ]
    rng.shuffle(pairs)
    for i, j in pairs:
        changed = list(things)
        changed[i] = replace(things[i], **{field: getattr(things[j], field)})
        changed[j] = replace(things[j], **{field: getattr(things[i], field)})
        if set(changed) != set(things):  # exchanging the places of two equal things changes nothing
            return tuple(changed)
    return None


def replace_kind(things: tuple[Thing, ...], rng: Random) -> tuple[Thing, ...]:
    """Change the kind of one thing."""
    return _replace(things, "kind", KINDS, rng)


def replace_attribute(things: tuple[Thing, ...], rng: Random) -> tuple[Thing, ...]:
    """Change the color or the size of one thing."""
    field, values = rng.choice((("color", tuple(COLORS)), ("size", SIZES)))
    return _replace(things, field, values, rng)


def _replace(things: tuple[Thing, ...], field: str, values: tuple[str, ...], rng: Random) -> tuple[Thing, ...]:
    """Change a field of one random thing to another of its values."""
    index = rng.randrange(len(things))
    value = rng.choice([value for value in values if value != getattr(things[index], field)])
    return (*things[:index], replace(things[index], **{field: value}), *things[index + 1 :])


def hard_negatives(things: tuple[Thing, ...], rng: Random) -> dict[str, tuple[Thing, ...]]:
    """Make false versions of the things that differ little from the true one, by SugarCrepe's name for the change."""
    changed = {
        "replace_obj": replace_kind(things, rng),
        "replace_att": replace_attribute(things, rng),
        "swap_obj": swap_places(things, rng),
        "swap_att": swap_attributes(things, rng),
    }
    return {change: result for change, result in changed.items() if result is not None}
