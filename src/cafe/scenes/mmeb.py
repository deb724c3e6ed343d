"""Write the four kinds of MMEB's tasks: classification, visual question answering, retrieval and grounding."""

from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cafe.scenes.draw import crop_place, paint
from cafe.scenes.files import image_path
from cafe.scenes.words import caption, name, questions
from cafe.scenes.world import KINDS, PLACES, Scene, Split, Thing

MMEB_IMAGE = "<|image_1|>"  # where an image stands in an MMEB text
_CANDIDATES = 8  # of one evaluation row
_MAX_SEARCHED_SCENES = 40  # for wrong answers, once there is one


def write_mmeb(scenes: list[Scene], split: Split, directory: Path) -> None:
    """Write one table per task: with MMEB-train's columns for the training split, with MMEB-eval's for the other.

    Args:
        scenes: what the rows are about.
        split: which one they are of.
        directory: the folder of all data; tables are written to folders in it.
    """
    folder = directory / ("mmeb_train" if split == "train" else "mmeb_eval")
    folder.mkdir(exist_ok=True)
    for task, rows in _tasks(scenes, directory).items():
        table = _training_table(rows) if split == "train" else _evaluation_table(rows)
        pq.write_table(pa.Table.from_pylist(table), folder / f"{task}.parquet")


def _tasks(scenes: list[Scene], directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Make the rows of each task: queries (text, image) with candidates (text, image), the right one first."""
    tasks: dict[str, list[dict[str, Any]]] = {"classification": [], "vqa": [], "retrieval": [], "grounding": []}
    (directory / "images" / "crops").mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        # One generator for all tasks of a scene: their order decides what is drawn.
        rng = Random(f"mmeb {scene.name}")
        thing = rng.choice(scene.things)
        if len(scene.things) == 1:
            tasks["classification"].append(_classification(scene, thing, rng))
        tasks["vqa"].append(_vqa(scenes, number, rng))
        tasks["retrieval"].append(_retrieval(scenes, scene, rng))
        tasks["grounding"].append(_grounding(scene, thing, directory))
    return tasks


def _classification(scene: Scene, thing: Thing, rng: Random) -> dict[str, Any]:
    """Ask for the kind of the only thing in a scene."""
    other_kinds = [kind for kind in KINDS if kind != thing.kind]
    kinds = [thing.kind, *rng.sample(other_kinds, _CANDIDATES - 1)]
    query = f"{MMEB_IMAGE}\nIdentify the object in the image."
    return _row(query, image_path(scene), _text_candidates(kinds))


def _vqa(scenes: list[Scene], number: int, rng: Random) -> dict[str, Any]:
    """Ask a question whose wrong answers come from other scenes."""
    scene = scenes[number]
    question = rng.choice(questions(scene, rng))
    wrong = _other_answers(scenes, number, question.kind, question.answer, rng)
    query = f"{MMEB_IMAGE}\nRepresent the image with the question: {question.text}"
    return _row(query, image_path(scene), _text_candidates([question.answer, *wrong]))


def _retrieval(scenes: list[Scene], scene: Scene, rng: Random) -> dict[str, Any]:
    """Search for the image of a caption."""
    shuffled = rng.sample(scenes, len(scenes))
    # An image with the same things would be a second right answer: training images may repeat.
    things = set(scene.things)
    others = [other for other in shuffled if set(other.things) != things]
    candidates = [scene, *others][:_CANDIDATES]
    query = f"Find an image that matches the caption: {caption(scene.things, rng)}"
    text = f"{MMEB_IMAGE}\nRepresent the image."
    return _row(query, "", [(text, image_path(candidate)) for candidate in candidates])


def _grounding(scene: Scene, thing: Thing, directory: Path) -> dict[str, Any]:
    """Search for the quarter of an image that shows a thing; the quarters are written as images of their own."""
    painted = paint(scene)
    crops = []
    other_places = [place for place in PLACES if place != thing.place]
    for place in (thing.place, *other_places):
        # The right quarter comes first, as in every row of candidates.
        crop = f"images/crops/{scene.name}-{place.replace(' ', '-')}.png"
        crop_place(painted, place).save(directory / crop)
        crops.append((f"{MMEB_IMAGE}\nRepresent the cropped image.", crop))
    query = f"{MMEB_IMAGE}\nSelect the part of the image that shows: {name(thing)}"
    return _row(query, image_path(scene), crops)


def _text_candidates(texts: list[str]) -> list[tuple[str, str]]:
    """Make candidates of texts without images."""
    return [(text, "") for text in texts]


def _row(query: str, image: str, candidates: list[tuple[str, str]]) -> dict[str, Any]:
    """Make a row of a task, from which both kinds of tables are made."""
    return {"query": query, "image": image, "candidates": candidates}


def _other_answers(scenes: list[Scene], number: int, kind: str, right: str, rng: Random) -> list[str]:
    """Collect up to seven wrong answers to questions of the same kind from other scenes."""
    wanted = _CANDIDATES - 1
    answers: dict[str, None] = {}  # a dict, since it keeps the order that a set does not
    for step in range(1, len(scenes)):
        # The scenes that follow in the list, and after its end those at its beginning.
        other = scenes[(number + step) % len(scenes)]
        same_kind = [question.answer for question in questions(other, rng) if question.kind == kind]
        answers |= dict.fromkeys(same_kind)
        answers.pop(right, None)
        # Kinds with few different answers, such as yes and no, never fill the list.
        is_enough = len(answers) > 0 and step > _MAX_SEARCHED_SCENES
        if is_enough or len(answers) >= wanted:
            break
    return list(answers)[:wanted]


def _training_table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Make rows with MMEB-train's columns; the first wrong candidate, if there is one, is the hard negative."""
    table = []
    for row in rows:
        # A pair of empty texts stands for a wrong candidate where there is none.
        (pos_text, pos_image), (neg_text, neg_image) = [*row["candidates"], ("", "")][:2]
        query = {"qry": row["query"], "qry_image_path": row["image"]}
        positive = {"pos_text": pos_text, "pos_image_path": pos_image}
        table.append({**query, **positive, "neg_text": neg_text, "neg_image_path": neg_image})
    return table


def _evaluation_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make rows with MMEB-eval's columns, candidates as lists; rows without a wrong candidate are left out."""
    table = []
    for row in rows:
        if len(row["candidates"]) == 1:
            continue
        texts, images = zip(*row["candidates"], strict=True)
        query = {"qry_text": row["query"], "qry_img_path": row["image"]}
        table.append({**query, "tgt_text": list(texts), "tgt_img_path": list(images)})
    return table
