"""Write the small world in the public formats that real data has. The same seed writes the same bytes."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from cafe.scenes.draw import SIDE, crop_place, paint
from cafe.scenes.words import (
    CAPTION_PROMPT,
    PARAGRAPH_PROMPT,
    article,
    caption,
    captions,
    captions_alike,
    hard_negatives,
    name,
    paragraph,
    questions,
    relation_between,
    swap_places,
)
from cafe.scenes.world import KINDS, PLACES, Scene, Thing, draw_scenes

MMEB_IMAGE = "<|image_1|>"  # where an image stands in an MMEB text
_CANDIDATES = 8  # of one MMEB evaluation row
_MMEB_ROWS = 400  # of one MMEB task
_POPE_IMAGES = 200
_VQA_IMAGES = 100  # of the pair of files in VQA v2's form, whose images have COCO's names
_WINOGROUND = 200  # maximum number of examples
_PEOPLE = 10  # who answer each question of VQA v2
_QUARTER = SIDE // 2  # pixels


def write_scenes(
    directory: Path, seed: int = 0, train: int = 8000, test: int = 500, report: Callable[[str], None] = print
) -> None:
    """Write `train` training images and `test` distinct test images, with annotations in every format.

    Images are written to `images/`; the paths in annotation files are relative to `directory`.
    """
    splits = {
        "train": draw_scenes(seed, "train", train),
        "test": draw_scenes(seed, "test", test, distinct=True),
    }
    for split, scenes in splits.items():
        (directory / "images" / split).mkdir(parents=True, exist_ok=True)
        for scene in tqdm(scenes, desc=f"{split} images", unit="image"):
            paint(scene).save(directory / _image(scene))
    # Training data, in LLaVA's and Karpathy's formats.
    _json(directory / "llava_train.json", [_llava(index, scene) for index, scene in enumerate(splits["train"])])
    _json(directory / "vqa_train.json", [_llava_questions(scene) for scene in splits["train"]])
    _json(directory / "dataset_scenes.json", _karpathy([*splits["train"], *splits["test"]]))
    # Evaluation data, one set of files per suite.
    _json_lines(directory / "captions_test.jsonl", (_caption(n, scene) for n, scene in enumerate(splits["test"])))
    _json_lines(directory / "paragraphs_test.jsonl", map(_paragraph, splits["test"]))
    _json_lines(directory / "vqa_test.jsonl", _vqa(splits["test"]))
    for kind, absent in _pope_absent(splits["test"]).items():
        lines = _pope(splits["test"][:_POPE_IMAGES], absent)
        _json_lines(directory / "pope" / f"scenes_pope_{kind}.json", lines)
    _json(directory / "annotations" / "instances_scenes.json", _instances(splits["test"]))
    for change, rows in _sugarcrepe(splits["test"]).items():
        _json(directory / "sugarcrepe" / f"{change}.json", {str(n): row for n, row in enumerate(rows)})
    for part, records in _aro(splits["test"]).items():
        _json(directory / "aro" / f"visual_genome_{part}.json", records)
    _write_winoground(splits["test"], directory / "winoground")
    _write_vqav2(splits["test"][:_VQA_IMAGES], directory)
    # MMEB, whose training and evaluation tables have different columns.
    for split, folder in (("train", "mmeb_train"), ("test", "mmeb_eval")):
        for task, rows in _mmeb(splits[split][:_MMEB_ROWS], directory).items():
            table = _mmeb_training(rows) if split == "train" else _mmeb_evaluation(rows)
            (directory / folder).mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(table), directory / folder / f"{task}.parquet")
    report(f"Wrote {train} training and {test} test images with annotations to {directory}")


def _image(scene: Scene) -> str:
    return f"images/{scene.split}/{scene.name}.png"


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=0) + "\n")


def _json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _llava(index: int, scene: Scene) -> dict[str, Any]:
    """Make a record with a caption, or a paragraph every tenth time, and false captions as hard negatives."""
    rng = Random(f"llava {scene.name}")
    long = index % 10 == 9
    exchange = (PARAGRAPH_PROMPT, paragraph(scene, rng)) if long else (CAPTION_PROMPT, caption(scene.things, rng))
    negatives = [caption(things, rng) for things in hard_negatives(scene.things, rng).values()]
    return {"id": scene.name, "image": _image(scene), "conversations": _turns([exchange]), "negatives": negatives}


def _llava_questions(scene: Scene) -> dict[str, Any]:
    """Make a record with three questions, as in instruction data: no answer occurs earlier in the dialogue."""
    rng = Random(f"llava questions {scene.name}")
    exchanges = [(question.text, question.answer) for question in rng.sample(questions(scene, rng), 3)]
    return {"id": scene.name, "image": _image(scene), "conversations": _turns(exchanges)}


def _turns(exchanges: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Turn prompts with answers into LLaVA's conversations, with the image in the first turn."""
    conversations = []
    for turn, (prompt, answer) in enumerate(exchanges):
        image = "<image>\n" if turn == 0 else ""
        conversations.append({"from": "human", "value": image + prompt})
        conversations.append({"from": "gpt", "value": answer})
    return conversations


def _karpathy(scenes: list[Scene]) -> dict[str, Any]:
    """Make a Karpathy split file, with two different captions per image."""
    images = []
    for number, scene in enumerate(scenes):
        rng = Random(f"karpathy {scene.name}")
        texts: dict[str, None] = {}  # a dict, since it keeps the order that a set does not
        while len(texts) < 2:
            texts[caption(scene.things, rng)] = None
        sentences = []
        for text in texts:
            words = text.strip(".").replace(",", "").replace(":", "").split()
            sentences.append({"raw": text, "tokens": words})
        row = {"filename": f"{scene.name}.png", "filepath": f"images/{scene.split}", "split": scene.split}
        images.append({**row, "sentences": sentences, "imgid": number, "cocoid": number})
    return {"dataset": "scenes", "images": images}


def _caption(number: int, scene: Scene) -> dict[str, Any]:
    """Make a captioning question that accepts every true caption."""
    row = {"question_id": number, "image": _image(scene), "text": CAPTION_PROMPT}
    return {**row, "answers": captions(scene.things), "objects": _kinds(scene)}


def _paragraph(scene: Scene) -> dict[str, Any]:
    return {"image": _image(scene), "caption": paragraph(scene, Random(f"paragraph {scene.name}"))}


def _vqa(scenes: list[Scene]) -> Iterable[dict[str, Any]]:
    """Yield two questions per image, each with its answer."""
    number = 0
    for scene in scenes:
        rng = Random(f"vqa {scene.name}")
        for question in rng.sample(questions(scene, rng), 2):
            row = {"question_id": number, "image": _image(scene), "text": question.text}
            yield {**row, "answer": question.answer, "category": question.kind}
            number += 1


def _kinds(scene: Scene) -> list[str]:
    return sorted({thing.kind for thing in scene.things})


def _pope_absent(scenes: list[Scene]) -> dict[str, Callable[[Scene], list[str]]]:
    """Return functions that rank the kinds absent from a scene, one per sampling of POPE (arXiv 2305.10355)."""
    frequency = Counter(kind for scene in scenes for kind in _kinds(scene))
    cooccurrences = Counter(pair for scene in scenes for pair in permutations(_kinds(scene), 2))

    def absent(scene: Scene) -> list[str]:
        return [kind for kind in KINDS if kind not in _kinds(scene)]

    def cooccurrence(scene: Scene, kind: str) -> int:
        return sum(cooccurrences[present, kind] for present in _kinds(scene))

    return {
        "random": lambda scene: Random(f"pope {scene.name}").sample(absent(scene), len(absent(scene))),
        "popular": lambda scene: sorted(absent(scene), key=lambda kind: -frequency[kind]),
        "adversarial": lambda scene: sorted(absent(scene), key=lambda kind: -cooccurrence(scene, kind)),
    }


def _pope(scenes: list[Scene], absent: Callable[[Scene], list[str]]) -> Iterable[dict[str, Any]]:
    """Yield as many questions about kinds that are absent as about those that are present."""
    number = 0
    for scene in scenes:
        present = _kinds(scene)
        for yes, no in zip(present, absent(scene), strict=False):
            for kind, label in ((yes, "yes"), (no, "no")):
                number += 1
                text = f"Is there {article(kind)} {kind} in the image?"
                yield {"question_id": number, "image": _image(scene), "text": text, "label": label}


def _instances(scenes: list[Scene]) -> dict[str, Any]:
    """List the things of each image as COCO's instances; `info` holds the prompt for a description."""
    number = {kind: index for index, kind in enumerate(KINDS, 1)}  # COCO counts categories from 1
    return {
        "info": {"description": "scenes", "prompt": CAPTION_PROMPT},
        "images": [{"id": index, "file_name": _image(scene)} for index, scene in enumerate(scenes)],
        "annotations": [
            {"id": 10 * index + place, "image_id": index, "category_id": number[thing.kind]}
            for index, scene in enumerate(scenes)
            for place, thing in enumerate(scene.things)
        ],
        "categories": [{"id": index, "name": kind} for kind, index in number.items()],
    }


def _sugarcrepe(scenes: list[Scene]) -> dict[str, list[dict[str, str]]]:
    """Pair true captions with captions of changed things, by SugarCrepe's name for the change."""
    files: dict[str, list[dict[str, str]]] = {}
    for scene in scenes:
        changes = hard_negatives(scene.things, Random(f"sugarcrepe {scene.name}"))
        for change, things in changes.items():
            true, false = captions_alike(scene.things, things, Random(f"{change} {scene.name}"))
            row = {"filename": _image(scene), "caption": true, "negative_caption": false}
            files.setdefault(change, []).append(row)
    return files


def _aro(scenes: list[Scene]) -> dict[str, list[dict[str, Any]]]:
    """Make ARO's two parts from Visual Genome: relations between two things, and their colors; the box holds both."""
    parts: dict[str, list[dict[str, Any]]] = {"relation": [], "attribution": []}
    for scene in scenes:
        for pair in combinations(scene.things, 2):
            first, second = sorted(pair, key=lambda thing: (thing.color, thing.kind))
            box = {"image_path": _image(scene), **_box(first, second)}
            if relation := relation_between(first, second):
                true = f"the {name(first)} is {relation} the {name(second)}"
                false = f"the {name(second)} is {relation} the {name(first)}"
                row = {**box, "true_caption": true, "false_caption": false}
                parts["relation"].append({**row, "relation_name": relation})
            if first.color != second.color and first.kind != second.kind:
                recolored = replace(first, color=second.color), replace(second, color=first.color)
                true = f"the {name(first)} and the {name(second)}"
                false = f"the {name(recolored[0])} and the {name(recolored[1])}"
                row = {**box, "true_caption": true, "false_caption": false}
                parts["attribution"].append({**row, "attributes": [first.color, second.color]})
    return parts


def _box(*things: Thing) -> dict[str, int]:
    """Return the rectangle of quarters that contains things, in pixels."""
    rows, columns = zip(*(divmod(PLACES.index(thing.place), 2) for thing in things), strict=True)
    top, left = _QUARTER * min(rows), _QUARTER * min(columns)
    width, height = (_QUARTER * (1 + max(places) - min(places)) for places in (columns, rows))
    return {"bbox_x": left, "bbox_y": top, "bbox_w": width, "bbox_h": height}


def _write_winoground(scenes: list[Scene], directory: Path) -> None:
    """Write pairs of images in which two things have exchanged their places, with captions of the same words."""
    (directory / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for scene in scenes:
        rng = Random(f"winoground {scene.name}")
        things = swap_places(scene.things, rng)
        if things is None or len(rows) == _WINOGROUND:
            continue
        row: dict[str, Any] = {"id": len(rows)}
        texts = captions_alike(scene.things, things, rng)
        row |= {"caption_0": texts[0], "caption_1": texts[1]}
        for side, shown in enumerate((scene, replace(scene, things=things))):
            title = f"ex_{len(rows)}_img_{side}"
            row[f"image_{side}"] = title
            paint(shown).save(directory / "images" / f"{title}.png")
        rows.append(row)
    _json_lines(directory / "examples.jsonl", rows)


def _write_vqav2(scenes: list[Scene], directory: Path) -> None:
    """Write questions and annotations in VQA v2's format, with ten equal answers each, and images with COCO's names."""
    asked: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (directory / "val2014").mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        paint(scene).save(directory / "val2014" / f"COCO_val2014_{number:012}.jpg", quality=95, subsampling=0)
        rng = Random(f"vqa v2 {scene.name}")
        for question in rng.sample(questions(scene, rng), 2):
            ids = {"question_id": len(asked), "image_id": number}
            asked.append({**ids, "question": question.text})
            kind = {"presence": "yes/no", "count": "number"}.get(question.kind, "other")
            answers = [{"answer_id": person, "answer": question.answer} for person in range(1, _PEOPLE + 1)]
            annotations.append({**ids, "answer_type": kind, "question_type": question.kind, "answers": answers})
    info = {
        "description": "scenes",
        "prompt": "",
    }  # the base model was not trained on prompts that ask for short answers
    _json(directory / "vqa" / "scenes_questions.json", {"info": info, "data_subtype": "val2014", "questions": asked})
    _json(directory / "vqa" / "scenes_annotations.json", {"data_subtype": "val2014", "annotations": annotations})


def _mmeb(scenes: list[Scene], directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Make MMEB's four kinds of task: queries (text, image) with candidates (text, image), the right one first."""
    tasks: dict[str, list[dict[str, Any]]] = {"classification": [], "vqa": [], "retrieval": [], "grounding": []}
    (directory / "images" / "crops").mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        # One generator for all tasks of a scene: their order decides what is drawn.
        rng = Random(f"mmeb {scene.name}")
        thing = rng.choice(scene.things)
        if len(scene.things) == 1:
            tasks["classification"].append(_mmeb_classification(scene, thing, rng))
        tasks["vqa"].append(_mmeb_vqa(scenes, number, rng))
        tasks["retrieval"].append(_mmeb_retrieval(scenes, scene, rng))
        tasks["grounding"].append(_mmeb_grounding(scene, thing, directory))
    return tasks


def _mmeb_classification(scene: Scene, thing: Thing, rng: Random) -> dict[str, Any]:
    """Ask for the kind of the only thing in a scene."""
    others = [kind for kind in KINDS if kind != thing.kind]
    kinds = [thing.kind, *rng.sample(others, _CANDIDATES - 1)]
    return _mmeb_row(f"{MMEB_IMAGE}\nIdentify the object in the image.", _image(scene), [(kind, "") for kind in kinds])


def _mmeb_vqa(scenes: list[Scene], number: int, rng: Random) -> dict[str, Any]:
    """Ask a question whose wrong answers come from other scenes."""
    scene = scenes[number]
    question = rng.choice(questions(scene, rng))
    wrong = _other_answers(scenes, number, question.kind, question.answer, rng)
    query = f"{MMEB_IMAGE}\nRepresent the image with the question: {question.text}"
    return _mmeb_row(query, _image(scene), [(answer, "") for answer in (question.answer, *wrong)])


def _mmeb_retrieval(scenes: list[Scene], scene: Scene, rng: Random) -> dict[str, Any]:
    """Search for the image of a caption."""
    # An image with the same things would be a second right answer: training images may repeat.
    others = [other for other in rng.sample(scenes, len(scenes)) if set(other.things) != set(scene.things)]
    shown = [(f"{MMEB_IMAGE}\nRepresent the image.", _image(each)) for each in (scene, *others)]
    query = f"Find an image that matches the caption: {caption(scene.things, rng)}"
    return _mmeb_row(query, "", shown[:_CANDIDATES])


def _mmeb_grounding(scene: Scene, thing: Thing, directory: Path) -> dict[str, Any]:
    """Search for the quarter of an image that shows a thing; the quarters are written as images of their own."""
    painted, crops = paint(scene), []
    other_places = [place for place in PLACES if place != thing.place]
    for place in (thing.place, *other_places):
        crop = f"images/crops/{scene.name}-{place.replace(' ', '-')}.png"
        crop_place(painted, place).save(directory / crop)
        crops.append((f"{MMEB_IMAGE}\nRepresent the cropped image.", crop))
    query = f"{MMEB_IMAGE}\nSelect the part of the image that shows: {name(thing)}"
    return _mmeb_row(query, _image(scene), crops)


def _mmeb_row(query: str, image: str, candidates: list[tuple[str, str]]) -> dict[str, Any]:
    return {"query": query, "image": image, "candidates": candidates}


def _other_answers(scenes: list[Scene], number: int, kind: str, right: str, rng: Random) -> list[str]:
    """Collect up to seven wrong answers to questions of the same kind from other scenes."""
    answers: dict[str, None] = {}
    for step in range(1, len(scenes)):
        for question in questions(scenes[(number + step) % len(scenes)], rng):
            if question.kind == kind and question.answer != right:
                answers[question.answer] = None
        # Kinds with few different answers, such as yes and no, never fill the list.
        if len(answers) >= _CANDIDATES - 1 or (step > 40 and answers):
            break
    return list(answers)[: _CANDIDATES - 1]


def _mmeb_training(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Make rows with MMEB-train's columns; the first wrong candidate, if there is one, is the hard negative."""
    table = []
    for row in rows:
        (pos_text, pos_image), (neg_text, neg_image) = [*row["candidates"], ("", "")][:2]
        query = {"qry": row["query"], "qry_image_path": row["image"]}
        positive = {"pos_text": pos_text, "pos_image_path": pos_image}
        table.append({**query, **positive, "neg_text": neg_text, "neg_image_path": neg_image})
    return table


def _mmeb_evaluation(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make rows with MMEB-eval's columns, candidates as lists; rows without a wrong candidate are left out."""
    return [
        {
            "qry_text": row["query"],
            "qry_img_path": row["image"],
            "tgt_text": [text for text, _ in row["candidates"]],
            "tgt_img_path": [image for _, image in row["candidates"]],
        }
        for row in rows
        if len(row["candidates"]) > 1
    ]
