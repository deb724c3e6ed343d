"""Make the rows of the evaluation files, each in its suite's format, from test scenes and single drawings."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from another_hand.scenes import Scene, image_path
from another_hand.words import COUNT, DESCRIBE, GROUP, NAME, NUMBERS, choice, description, presence

Row = dict[str, Any]
PROBED = 2  # concepts of a scene that are asked for, at most
KINDS = ("random", "popular", "adversarial", "subgroup")  # of absent concepts
OPTIONS = 4


@dataclass(frozen=True)
class Asked:
    """Hold what questions are drawn from.

    Attributes:
        concepts: those that may be asked for, also where they are absent.
        subgroups: by concept, the concepts of its subgroup.
        groups: by concept, the name of its group.
        partners: by concept, the one that stands with it in training; empty where there are none.
        frequency: by concept, the number of training scenes that show it.
    """

    concepts: Sequence[str]
    subgroups: Mapping[str, Sequence[str]]
    groups: Mapping[str, str]
    partners: Mapping[str, str]
    frequency: Mapping[str, int]


def karpathy(scenes: Sequence[Scene]) -> Row:
    """Make a Karpathy split file, with one caption per image."""
    images = []
    for number, scene in enumerate(scenes):
        text = description(scene)
        sentence = {"raw": text, "tokens": text.strip(".").replace(",", "").split()}
        row = {"filename": f"{scene.name}.png", "filepath": "images", "split": "test", "sentences": [sentence]}
        images.append({**row, "imgid": number, "cocoid": number})
    return {"dataset": "scenes", "images": images}


def caption_questions(scenes: Sequence[Scene]) -> Iterator[Row]:
    """Yield a captioning question per scene, to which the description alone is a right answer."""
    for number, scene in enumerate(scenes):
        row = {"question_id": number, "image": image_path(scene), "text": DESCRIBE}
        yield {**row, "answers": [description(scene)], "objects": sorted(scene.concepts)}


def instances(scenes: Sequence[Scene], names: Sequence[str]) -> Row:
    """List what scenes show as COCO's instances; the prompt in `info` lets CHAIR and THRONE ask as `captions` does.

    Args:
        scenes: the scenes.
        names: the closed list of names: a description that names another one names what is absent.
    """
    ids = {name: number for number, name in enumerate(names, start=1)}  # COCO counts categories from 1
    annotations: list[Row] = []
    for image_id, scene in enumerate(scenes):
        for concept in scene.concepts:
            annotations.append({"id": len(annotations), "image_id": image_id, "category_id": ids[concept]})
    return {
        "info": {"description": "drawings by another hand", "prompt": DESCRIBE},
        "images": [{"id": number, "file_name": image_path(scene)} for number, scene in enumerate(scenes)],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }


def pope(scenes: Sequence[Scene], asked: Asked) -> dict[str, list[Row]]:
    """Ask whether scenes show concepts, in as many questions to be answered yes as no.

    Returns:
        by kind of the absent concepts, the questions. The kinds share the questions to be answered yes, except that a
        kind leaves out those beside which it has no absent concept: not everything has a partner.
    """
    files: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    for scene in scenes:
        rng = Random(f"pope {scene.name}")
        # What has a partner first, so that most scenes have a question about an absent partner.
        shown = sorted(rng.sample(scene.concepts, len(scene.concepts)), key=lambda one: one not in asked.partners)
        for kind, rows in files.items():
            taken = set(scene.concepts)
            for present in shown[:PROBED]:
                candidates = [one for one in _absent(kind, present, asked) if one not in taken]
                if not candidates:
                    continue
                absent = rng.choice(candidates)
                taken.add(absent)
                for concept, label in ((present, "yes"), (absent, "no")):
                    row = {"question_id": len(rows) + 1, "image": image_path(scene), "text": presence(concept)}
                    rows.append({**row, "label": label})
    return {kind: rows for kind, rows in files.items() if rows}


def _absent(kind: str, present: str, asked: Asked) -> Sequence[str]:
    """List the concepts of a kind that may be asked for beside a present one, absent or not."""
    match kind:
        case "popular":
            # POPE takes the most frequent ones; the most frequent tenth is asked for more evenly.
            ranked = sorted(asked.concepts, key=lambda concept: -asked.frequency[concept])
            return ranked[: max(2 * OPTIONS, len(ranked) // 10)]
        case "adversarial":
            return [asked.partners[present]] if present in asked.partners else []
        case "subgroup":
            return asked.subgroups[present]
    return asked.concepts


def questions(scenes: Sequence[Scene], singles: Sequence[Scene], asked: Asked) -> Iterator[Row]:
    """Yield short questions: for each drawing its name, freely and of four, and its group; for scenes the number."""
    rows = [row for single in singles for row in _about_single(single, asked)]
    rows += [(scene, COUNT, NUMBERS[len(scene.things)], "count") for scene in scenes]
    for number, (scene, text, answer, category) in enumerate(rows):
        row = {"question_id": number, "image": image_path(scene), "text": text}
        yield {**row, "answer": answer, "category": category}


def _about_single(scene: Scene, asked: Asked) -> list[tuple[Scene, str, str, str]]:
    """Ask for the name of a single drawing, for one of four names, and for its group."""
    (concept,) = scene.concepts
    which, right = choice(concept, distractors(concept, asked, Random(f"choice {scene.name}")), Random(scene.name))
    return [
        (scene, NAME, concept, "name"),
        (scene, which, right, "choice"),
        (scene, GROUP, asked.groups[concept], "group"),
    ]


def distractors(concept: str, asked: Asked, rng: Random) -> list[str]:
    """Draw three wrong names of the concept's subgroup; where that is too small, of its group, and then of all."""
    same_group = [other for other in asked.concepts if asked.groups[other] == asked.groups[concept]]
    chosen: dict[str, None] = {}
    for candidates in (asked.subgroups[concept], same_group, asked.concepts):
        chosen |= dict.fromkeys(rng.sample(candidates, len(candidates)))
    chosen.pop(concept)
    return list(chosen)[: OPTIONS - 1]


def count_concepts(scenes: Sequence[Scene]) -> Counter[str]:
    """Count the scenes that show each concept."""
    return Counter(concept for scene in scenes for concept in scene.concepts)
