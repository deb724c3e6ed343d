"""Describe a scene: captions, paragraphs, questions with answers and hard negatives, all of them exact.

Everything follows from the `Scene` alone, so a program can check any sentence that a model generates about an image.
"""

from dataclasses import dataclass, replace
from itertools import combinations, islice, pairwise, permutations
from random import Random

from cafe.scenes.world import COLORS, KINDS, PLACES, SIZES, Scene, Thing

CAPTION_PROMPT = "Describe the image."
PARAGRAPH_PROMPT = "Describe the image in detail."
# By number: a scene has four things at most.
NUMBERS = ("zero", "one", "two", "three", "four")
QUESTION_KINDS = ("presence", "count", "color", "shape", "place", "relation")


@dataclass(frozen=True)
class Question:
    """Hold a question about one image and its only right answer; `kind` is one of `QUESTION_KINDS`."""

    kind: str
    text: str
    answer: str


def article(word: str) -> str:
    """Return "a" or "an", whichever the following word needs."""
    # "one" begins with the sound of a consonant.
    if word == "one" or word[0] not in "aeiou":
        return "a"
    return "an"


def name(thing: Thing) -> str:
    """Return the shortest name that identifies a thing in its scene, e.g. "red circle"."""
    return f"{thing.color} {thing.kind}"


def full_name(thing: Thing) -> str:
    """Name a thing with its article and its size, e.g. "a small red circle"."""
    return f"a {thing.size} {thing.color} {thing.kind}"


def _join(phrases: list[str]) -> str:
    """Join phrases as in "a, b and c"."""
    *leading, last = phrases
    if not leading:
        return last
    return ", ".join(leading) + " and " + last


def caption_with_at(things: tuple[Thing, ...]) -> str:
    """Write the caption that names each thing before its place."""
    phrases = [f"{full_name(thing)} at the {thing.place}" for thing in things]
    return _join(phrases) + "."


def caption_by_place(things: tuple[Thing, ...]) -> str:
    """Write the caption that names each place before the thing that is there."""
    phrases = [f"{thing.place}: {full_name(thing)}" for thing in things]
    return ", ".join(phrases) + "."


def caption_with_there_is(things: tuple[Thing, ...]) -> str:
    """Write the caption that is a whole sentence."""
    phrases = [f"{full_name(thing)} in the {thing.place}" for thing in things]
    return "there is " + _join(phrases) + "."


_IN_READING_ORDER = 0.9  # of the captions
_CAPTION_TEMPLATES = (caption_with_at, caption_by_place, caption_with_there_is)


def in_reading_order(things: tuple[Thing, ...]) -> tuple[Thing, ...]:
    """Sort things row by row, from the left."""
    return tuple(sorted(things, key=lambda thing: PLACES.index(thing.place)))


def captions(things: tuple[Thing, ...], orders: int | None = None) -> list[str]:
    """Write every true short caption: each template with the things in each order.

    Args:
        things: what is in the image.
        orders: how many orders to write; None writes all.
    """
    chosen_orders = list(islice(permutations(things), orders))
    written: list[str] = []
    for template in _CAPTION_TEMPLATES:
        written += map(template, chosen_orders)
    return written


def caption(things: tuple[Thing, ...], rng: Random) -> str:
    """Write one of `captions` at random; most are in reading order, as those of people."""
    return captions_alike(things, things, rng)[0]


def captions_alike(things: tuple[Thing, ...], others: tuple[Thing, ...], rng: Random) -> tuple[str, str]:
    """Write captions of things and of their changed versions, in the same order and with the same template.

    Args:
        things: what is in the image.
        others: the changed version of each.
        rng: chooses the template and the order.
    """
    template = rng.choice(_CAPTION_TEMPLATES)
    order = in_reading_order(things)
    if rng.random() > _IN_READING_ORDER:
        order = tuple(rng.sample(things, len(things)))
    # The changed things take the places of the true ones in the sentence, wherever they are in the image.
    changed = dict(zip(things, others, strict=True))
    changed_order = tuple(changed[thing] for thing in order)
    return template(order), template(changed_order)


def paragraph(scene: Scene, rng: Random) -> str:
    """Write a caption of several sentences that also describes the background and counts the things."""
    things = rng.sample(scene.things, len(scene.things))
    noun = "object" if len(things) == 1 else "objects"
    sentences = [f"The picture shows {NUMBERS[len(things)]} {noun} on a {scene.texture} {scene.tone} background."]
    for thing in things:
        form = rng.choice(("At the {place} there is {full}.", "In the {place} stands {full}."))
        sentences.append(form.format(place=thing.place, full=full_name(thing)))
    # Only of things that follow each other in the text, which keeps it short.
    for first, second in pairwise(things):
        relation = relation_between(first, second)
        if relation:
            sentences.append(f"The {name(first)} is {relation} the {name(second)}.")
    return " ".join(sentences)


def relation_between(first: Thing, second: Thing) -> str | None:
    """Return where the first thing is relative to the second; None unless they share a row or a column."""
    row, column = divmod(PLACES.index(first.place), 2)
    other_row, other_column = divmod(PLACES.index(second.place), 2)
    if row == other_row:
        return "left of" if column < other_column else "right of"
    if column == other_column:
        return "above" if row < other_row else "below"
    return None


def questions(scene: Scene, rng: Random) -> list[Question]:
    """Ask one question of every kind that the scene allows, in a fixed order of kinds."""
    target = rng.choice(scene.things)
    # All kinds draw from one generator, so their order decides what is asked.
    asked = [
        _presence_question(scene, target, rng),
        _count_question(scene, target, rng),
        _color_question(scene, target),
        _shape_question(scene, target),
        Question("place", f"Where is the {name(target)}?", target.place),
    ]
    relation = _relation_question(scene, rng)
    if relation:
        asked.append(relation)
    return asked


def _presence_question(scene: Scene, target: Thing, rng: Random) -> Question:
    """Ask for a color and kind, or for a kind alone; half of the time for one that is absent."""
    is_present = rng.random() < 0.5
    answer = "yes" if is_present else "no"
    asks_for_color = rng.random() < 0.5
    if asks_for_color:
        subject = name(target if is_present else near_miss(scene, rng))
        return Question("presence", f"Is there {article(subject)} {subject}?", answer)
    subject = target.kind
    if not is_present:
        subject = rng.choice(absent_kinds(scene))
    return Question("presence", f"Is there {article(subject)} {subject} in the image?", answer)


def _count_question(scene: Scene, target: Thing, rng: Random) -> Question:
    """Ask for the number of all things, or of those that have the target's color."""
    if rng.random() < 0.5:
        return Question("count", "How many objects are there?", NUMBERS[len(scene.things)])
    same_color = _colors(scene).count(target.color)
    return Question("count", f"How many {target.color} objects are there?", NUMBERS[same_color])


# A question names its target by what identifies it, or it would have two right answers.
def _color_question(scene: Scene, target: Thing) -> Question:
    """Ask for the target's color, by its kind where that identifies it and by its place elsewhere."""
    kinds = [thing.kind for thing in scene.things]
    if kinds.count(target.kind) == 1:
        return Question("color", f"What color is the {target.kind}?", target.color)
    return Question("color", f"What color is the object at the {target.place}?", target.color)


def _shape_question(scene: Scene, target: Thing) -> Question:
    """Ask for the target's kind, by its color where that identifies it and by its place elsewhere."""
    if _colors(scene).count(target.color) == 1:
        return Question("shape", f"What is the {target.color} object?", target.kind)
    return Question("shape", f"What is the object at the {target.place}?", target.kind)


def _relation_question(scene: Scene, rng: Random) -> Question | None:
    """Ask what is beside, above or below a thing; None where no two things share a row or a column."""
    related = []
    for first, second in permutations(scene.things, 2):
        relation = relation_between(first, second)
        if relation:
            related.append((first, second, relation))
    if not related:
        return None
    # A row or a column holds two things at most, so only one answer is right.
    first, second, relation = rng.choice(related)
    return Question("relation", f"What is {relation} the {name(second)}?", name(first))


def _colors(scene: Scene) -> list[str]:
    """List the colors of a scene's things."""
    return [thing.color for thing in scene.things]


def absent_kinds(scene: Scene) -> list[str]:
    """List the kinds of which a scene holds no thing, in the order of `KINDS`."""
    present = {thing.kind for thing in scene.things}
    return [kind for kind in KINDS if kind not in present]


def near_miss(scene: Scene, rng: Random) -> Thing:
    """Draw a thing that is not in the scene but shares its kind or its color with one that is."""
    present = set(map(name, scene.things))
    # A changed thing may be another one of the scene: draw until it is not.
    while True:
        thing = rng.choice(scene.things)
        changes_color = rng.random() < 0.5
        if changes_color:
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
    values = [getattr(thing, field) for thing in things]
    pairs = [(i, j) for i, j in combinations(range(len(things)), 2) if values[i] != values[j]]
    rng.shuffle(pairs)
    for i, j in pairs:
        changed = list(things)
        changed[i] = replace(things[i], **{field: values[j]})
        changed[j] = replace(things[j], **{field: values[i]})
        if set(changed) != set(things):  # exchanging the places of two equal things changes nothing
            return tuple(changed)
    return None


def replace_kind(things: tuple[Thing, ...], rng: Random) -> tuple[Thing, ...]:
    """Change the kind of one thing."""
    return _replace(things, "kind", KINDS, rng)


def replace_attribute(things: tuple[Thing, ...], rng: Random) -> tuple[Thing, ...]:
    """Change the color or the size of one thing."""
    fields = (("color", tuple(COLORS)), ("size", SIZES))
    field, values = rng.choice(fields)
    return _replace(things, field, values, rng)


def _replace(things: tuple[Thing, ...], field: str, values: tuple[str, ...], rng: Random) -> tuple[Thing, ...]:
    """Change a field of one random thing to another of its values."""
    index = rng.randrange(len(things))
    old_value = getattr(things[index], field)
    new_value = rng.choice([value for value in values if value != old_value])
    changed = list(things)
    changed[index] = replace(things[index], **{field: new_value})
    return tuple(changed)


def hard_negatives(things: tuple[Thing, ...], rng: Random) -> dict[str, tuple[Thing, ...]]:
    """Make false versions of the things that differ little from the true one, by SugarCrepe's name for the change."""
    # All changes draw from one generator, in this order.
    changed = {
        "replace_obj": replace_kind(things, rng),
        "replace_att": replace_attribute(things, rng),
        "swap_obj": swap_places(things, rng),
        "swap_att": swap_attributes(things, rng),
    }
    return {change: result for change, result in changed.items() if result is not None}
