"""Write the folders that `cafe evaluate` reads: drawings by other hands, in scenes without partners."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from another_hand.annotations import (
    Asked,
    caption_questions,
    count_concepts,
    instances,
    karpathy,
    pope,
    questions,
)
from another_hand.concepts import DEVELOPMENT_HAND, TEST_HANDS, Concept, slug, training_hands
from another_hand.retrieval import retrieval_tables
from another_hand.scenes import Drawings, Scene, compose, draw_concepts_apart, paint_all, pair_up, single
from cafe.scenes.files import write_json, write_json_lines


@dataclass(frozen=True)
class Folder:
    """Hold what an evaluation folder is drawn from.

    Attributes:
        name: the folder's.
        hands: by the name of a concept that it shows, the hands that drew it.
        concepts: those that it may ask for: all that training shows, or none of them.
    """

    name: str
    hands: Mapping[str, Sequence[str]]
    concepts: Sequence[Concept]


def plan_folders(concepts: Sequence[Concept], near_copies: Mapping[str, Sequence[str]]) -> list[Folder]:
    """List the folders.

    Args:
        concepts: all of them.
        near_copies: by hand, the concepts that it drew as a training hand did; their drawings are left out.
    """
    seen = [concept for concept in concepts if concept.seen]
    unseen = [concept for concept in concepts if not concept.seen]
    folders = []
    for hand in (DEVELOPMENT_HAND, *TEST_HANDS):
        drawn = {c.name: [hand] for c in seen if hand in c.icons and c.name not in near_copies[hand]}
        folders.append(Folder(hand, drawn, seen))
    return [
        *folders,
        Folder("new-scenes", training_hands(seen), seen),
        Folder("unseen", {c.name: [hand for hand in TEST_HANDS if hand in c.icons] for c in unseen}, unseen),
    ]


def draw_test_scenes(folder: Folder, count: int, seed: int) -> list[Scene]:
    """Draw scenes without partners, no two of which show the same concepts."""
    names = list(folder.hands)
    partners = partners_of(folder)
    rng = Random(f"{folder.name} {seed}")
    scenes: dict[frozenset[str], Scene] = {}
    while len(scenes) < count:
        shown = draw_concepts_apart(rng, names, partners, rng.randint(1, 4))
        if frozenset(shown) not in scenes:
            scenes[frozenset(shown)] = compose(f"scene-{len(scenes):04}", rng, shown, folder.hands)
    return list(scenes.values())


def draw_galleries(folder: Folder, seed: int) -> list[list[Scene]]:
    """Draw each concept alone, so that no gallery shows one twice.

    Each test hand has a gallery of its own; in new scenes, one of the training hands is drawn for each concept.
    """
    rng = Random(f"singles {folder.name} {seed}")
    if folder.name == "new-scenes":
        chosen = [{name: rng.choice(hands) for name, hands in folder.hands.items()}]
    else:
        hands = dict.fromkeys(hand for drawn in folder.hands.values() for hand in drawn)
        chosen = [{name: hand for name, drawn in folder.hands.items() if hand in drawn} for hand in hands]
    return [[single(f"{hand}-{slug(name)}", rng, name, hand) for name, hand in gallery.items()] for gallery in chosen]


def partners_of(folder: Folder) -> dict[str, str]:
    """Return the concepts that stand together in training, if the folder's are shown there."""
    if all(concept.seen for concept in folder.concepts):
        return pair_up([concept.name for concept in folder.concepts])
    return {}


def write_evaluation(
    directory: Path,
    folder: Folder,
    concepts: Sequence[Concept],
    drawings: Drawings,
    training: Sequence[Scene],
    count: int,
    seed: int,
) -> None:
    """Write a folder's images and the files of every suite.

    Args:
        directory: where it is written.
        folder: what it shows.
        concepts: all of them, which descriptions may name.
        drawings: what images are painted with.
        training: the training scenes, which say how frequent a concept is there.
        count: number of scenes.
        seed: decides what they show.
    """
    scenes, galleries = draw_test_scenes(folder, count, seed), draw_galleries(folder, seed)
    singles = [scene for gallery in galleries for scene in gallery]
    paint_all([*scenes, *singles], drawings, directory)
    asked = _asked(folder, training, scenes)
    names = [concept.name for concept in concepts]
    write_json(directory / "dataset_scenes.json", karpathy(scenes))
    write_json_lines(directory / "captions_test.jsonl", caption_questions(scenes))
    for kind, rows in pope(scenes, asked).items():
        write_json_lines(directory / "pope" / f"another_hand_{kind}.json", rows)
    write_json(directory / "annotations" / "instances_scenes.json", instances(scenes, names))
    (directory / "annotations" / "synonyms.txt").write_text("".join(f"{name}\n" for name in names))
    write_json_lines(directory / "vqa_test.jsonl", questions(scenes, singles, asked))
    (directory / "mmeb_eval").mkdir()
    for name, table in retrieval_tables(galleries, {concept.name: concept for concept in concepts}).items():
        pq.write_table(pa.Table.from_pylist(table), directory / "mmeb_eval" / f"{name}.parquet")


def _asked(folder: Folder, training: Sequence[Scene], scenes: Sequence[Scene]) -> Asked:
    """Collect what questions about a folder's scenes are drawn from."""
    subgroups: dict[str, list[str]] = {}
    for concept in folder.concepts:
        subgroups.setdefault(concept.subgroup, []).append(concept.name)
    # Training never shows what is unseen: then the folder itself says what is frequent.
    is_seen = all(concept.seen for concept in folder.concepts)
    return Asked(
        concepts=[concept.name for concept in folder.concepts],
        subgroups={concept.name: subgroups[concept.subgroup] for concept in folder.concepts},
        groups={concept.name: concept.group for concept in folder.concepts},
        partners=partners_of(folder),
        frequency=count_concepts(training if is_seen else scenes),
    )
