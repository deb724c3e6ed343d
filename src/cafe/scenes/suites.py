"""Make the files of evaluation suites from test scenes, each in the format of the real one."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from random import Random
from typing import Any

from cafe.scenes.draw import SIDE, paint
from cafe.scenes.files import image_path, write_json, write_json_lines
from cafe.scenes.words import (
    CAPTION_PROMPT,
    Question,
    absent_kinds,
    article,
    captions,
    captions_alike,
    hard_negatives,
    name,
    paragraph,
    questions,
    relation_between,
    swap_places,
)
from cafe.scenes.world import KINDS, PLACES, Scene, Thing

_POPE_IMAGES = 200
_VQA_IMAGES = 100  # of the pair of files in VQA v2's form, whose images have COCO's names
_WINOGROUND = 200  # maximum number of examples
_PEOPLE = 10  # who answer each question of VQA v2
_QUARTER = SIDE // 2  # pixels


def write_suites(scenes: list[Scene], directory: Path) -> None:
    """Write one set of files per suite."""
    write_json_lines(directory / "captions_test.jsonl", map(_caption_question, range(len(scenes)), scenes))
    write_json_lines(directory / "paragraphs_test.jsonl", map(_paragraph, scenes))
    write_json_lines(directory / "vqa_test.jsonl", _vqa(scenes))
    for sampling, absent in _pope_absent(scenes).items():
        rows = _pope(scenes[:_POPE_IMAGES], absent)
        write_json_lines(directory / "pope" / f"scenes_pope_{sampling}.json", rows)
    write_json(directory / "annotations" / "instances_scenes.json", _instances(scenes))
    for change, pairs in _sugarcrepe(scenes).items():
        numbered = {str(number): pair for number, pair in enumerate(pairs)}
        write_json(directory / "sugarcrepe" / f"{change}.json", numbered)
    for part, records in _aro(scenes).items():
        write_json(directory / "aro" / f"visual_genome_{part}.json", records)
    _write_winoground(scenes, directory / "winoground")
    _write_vqav2(scenes[:_VQA_IMAGES], directory)


def _caption_question(number: int, scene: Scene) -> dict[str, Any]:
    """Make a captioning question that accepts every true caption."""
    row = {"question_id": number, "image": image_path(scene), "text": CAPTION_PROMPT}
    return {**row, "answers": captions(scene.things), "objects": _kinds(scene)}


def _paragraph(scene: Scene) -> dict[str, Any]:
    """Make a record of long retrieval: an image and its paragraph."""
    rng = Random(f"paragraph {scene.name}")
    return {"image": image_path(scene), "caption": paragraph(scene, rng)}


def _vqa(scenes: list[Scene]) -> Iterable[dict[str, Any]]:
    """Yield two questions per image, each with its answer."""
    number = 0
    for scene in scenes:
        for question in _two_questions(scene, Random(f"vqa {scene.name}")):
            row = {"question_id": number, "image": image_path(scene), "text": question.text}
            yield {**row, "answer": question.answer, "category": question.kind}
            number += 1


def _two_questions(scene: Scene, rng: Random) -> list[Question]:
    """Draw two questions of different kinds about a scene."""
    return rng.sample(questions(scene, rng), 2)


def _kinds(scene: Scene) -> list[str]:
    """List the kinds of a scene's things, each once."""
    return sorted({thing.kind for thing in scene.things})


def _pope_absent(scenes: list[Scene]) -> dict[str, Callable[[Scene], list[str]]]:
    """Return functions that rank the kinds absent from a scene, one per sampling of POPE (arXiv 2305.10355)."""
    frequency: Counter[str] = Counter()
    cooccurrences: Counter[tuple[str, str]] = Counter()
    for scene in scenes:
        frequency.update(_kinds(scene))
        cooccurrences.update(permutations(_kinds(scene), 2))

    def at_random(scene: Scene) -> list[str]:
        """Shuffle the absent kinds."""
        absent = absent_kinds(scene)
        return Random(f"pope {scene.name}").sample(absent, len(absent))

    def by_frequency(scene: Scene) -> list[str]:
        """Rank first what is in most images."""
        return sorted(absent_kinds(scene), key=lambda kind: -frequency[kind])

    def by_cooccurrence(scene: Scene) -> list[str]:
        """Rank first what is most often in an image together with the scene's things."""
        present = _kinds(scene)
        return sorted(absent_kinds(scene), key=lambda kind: -sum(cooccurrences[other, kind] for other in present))

    return {"random": at_random, "popular": by_frequency, "adversarial": by_cooccurrence}


def _pope(scenes: list[Scene], absent: Callable[[Scene], list[str]]) -> Iterable[dict[str, Any]]:
    """Yield as many questions about kinds that are absent as about those that are present."""
    number = 0
    for scene in scenes:
        # The ranking is longer: as many of its first as there are present.
        for present_kind, absent_kind in zip(_kinds(scene), absent(scene), strict=False):
            for kind, label in ((present_kind, "yes"), (absent_kind, "no")):
                number += 1
                text = f"Is there {article(kind)} {kind} in the image?"
                yield {"question_id": number, "image": image_path(scene), "text": text, "label": label}


def _instances(scenes: list[Scene]) -> dict[str, Any]:
    """List the things of each image as COCO's instances; `info` holds the prompt for a description."""
    category_ids = {kind: number for number, kind in enumerate(KINDS, start=1)}  # COCO counts categories from 1
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, scene in enumerate(scenes):
        images.append({"id": image_id, "file_name": image_path(scene)})
        for number, thing in enumerate(scene.things):
            annotation_id = 10 * image_id + number  # an image has fewer than ten things
            category_id = category_ids[thing.kind]
            annotations.append({"id": annotation_id, "image_id": image_id, "category_id": category_id})
    return {
        "info": {"description": "scenes", "prompt": CAPTION_PROMPT},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": kind} for kind, number in category_ids.items()],
    }


def _sugarcrepe(scenes: list[Scene]) -> dict[str, list[dict[str, str]]]:
    """Pair true captions with captions of changed things, by SugarCrepe's name for the change."""
    files: dict[str, list[dict[str, str]]] = {}
    for scene in scenes:
        # Not every scene allows every change, so the files have different lengths.
        changes = hard_negatives(scene.things, Random(f"sugarcrepe {scene.name}"))
        for change, things in changes.items():
            true, false = captions_alike(scene.things, things, Random(f"{change} {scene.name}"))
            row = {"filename": image_path(scene), "caption": true, "negative_caption": false}
            files.setdefault(change, []).append(row)
    return files


def _aro(scenes: list[Scene]) -> dict[str, list[dict[str, Any]]]:
    """Make ARO's two parts from Visual Genome: relations between two things, and their colors; the box holds both."""
    parts: dict[str, list[dict[str, Any]]] = {"relation": [], "attribution": []}
    for scene in scenes:
        for pair in combinations(scene.things, 2):
            # In alphabetical order, so that the first thing is not always the one that a scene lists first.
            first, second = sorted(pair, key=lambda thing: (thing.color, thing.kind))
            box = {"image_path": image_path(scene), **_box(first, second)}
            relation = relation_between(first, second)
            if relation:
                parts["relation"].append({**box, **_aro_relation(first, second, relation)})
            # Exchanging equal colors, or those of equal kinds, would leave the caption true.
            if first.color != second.color and first.kind != second.kind:
                parts["attribution"].append({**box, **_aro_attribution(first, second)})
    return parts


def _aro_relation(first: Thing, second: Thing, relation: str) -> dict[str, Any]:
    """Make the captions of a relation: the false one exchanges the two things."""
    true = f"the {name(first)} is {relation} the {name(second)}"
    false = f"the {name(second)} is {relation} the {name(first)}"
    return {"true_caption": true, "false_caption": false, "relation_name": relation}


def _aro_attribution(first: Thing, second: Thing) -> dict[str, Any]:
    """Make the captions of two things: the false one exchanges their colors."""
    other_first = replace(first, color=second.color)
    other_second = replace(second, color=first.color)
    true = f"the {name(first)} and the {name(second)}"
    false = f"the {name(other_first)} and the {name(other_second)}"
    return {"true_caption": true, "false_caption": false, "attributes": [first.color, second.color]}


def _box(*things: Thing) -> dict[str, int]:
    """Return the rectangle of quarters that contains things, in pixels."""
    quarters = [divmod(PLACES.index(thing.place), 2) for thing in things]
    rows, columns = zip(*quarters, strict=True)
    return {
        "bbox_x": _QUARTER * min(columns),
        "bbox_y": _QUARTER * min(rows),
        "bbox_w": _QUARTER * (1 + max(columns) - min(columns)),
        "bbox_h": _QUARTER * (1 + max(rows) - min(rows)),
    }


def _write_winoground(scenes: list[Scene], directory: Path) -> None:
    """Write pairs of images in which two things have exchanged their places, with captions of the same words."""
    (directory / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for scene in scenes:
        if len(rows) == _WINOGROUND:
            break
        rng = Random(f"winoground {scene.name}")
        things = swap_places(scene.things, rng)
        if things is None:
            continue
        first_caption, second_caption = captions_alike(scene.things, things, rng)
        row = {"id": len(rows), "caption_0": first_caption, "caption_1": second_caption}
        for side, shown in enumerate((scene, replace(scene, things=things))):
            title = f"ex_{len(rows)}_img_{side}"
            row[f"image_{side}"] = title
            paint(shown).save(directory / "images" / f"{title}.png")
        rows.append(row)
    write_json_lines(directory / "examples.jsonl", rows)


def _write_vqav2(scenes: list[Scene], directory: Path) -> None:
    """Write questions and annotations in VQA v2's format, with ten equal answers each, and images with COCO's names."""
    asked: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (directory / "val2014").mkdir(parents=True, exist_ok=True)
    for image_id, scene in enumerate(scenes):
        file = f"COCO_val2014_{image_id:012}.jpg"
        # Without chroma subsampling, which would blur the colors of small shapes.
        paint(scene).save(directory / "val2014" / file, quality=95, subsampling=0)
        for question in _two_questions(scene, Random(f"vqa v2 {scene.name}")):
            ids = {"question_id": len(asked), "image_id": image_id}
            asked.append({**ids, "question": question.text})
            answer_type = {"presence": "yes/no", "count": "number"}.get(question.kind, "other")
            answers = [{"answer_id": person, "answer": question.answer} for person in range(1, _PEOPLE + 1)]
            types = {"answer_type": answer_type, "question_type": question.kind}
            annotations.append({**ids, **types, "answers": answers})
    # The base model was not trained on prompts that ask for short answers.
    info = {"description": "scenes", "prompt": ""}
    write_json(
        directory / "vqa" / "scenes_questions.json", {"info": info, "data_subtype": "val2014", "questions": asked}
    )
    write_json(directory / "vqa" / "scenes_annotations.json", {"data_subtype": "val2014", "annotations": annotations})
