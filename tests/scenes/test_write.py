"""The files of the small world have the public formats' fields, agree with the images, and are reproducible."""

import hashlib
import json
import re
from collections import Counter
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_words import solve

from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.scenes.words import CAPTION_PROMPT, PARAGRAPH_PROMPT, QUESTION_KINDS, captions, relation_between
from cafe.scenes.world import KINDS, Scene, draw_scenes
from cafe.scenes.write import write_scenes

TRAIN, TEST = 120, 60
POPE = ("random", "popular", "adversarial")
SUGARCREPE = ("replace_obj", "replace_att", "swap_obj", "swap_att")
TASKS = ("classification", "vqa", "retrieval", "grounding")
SIDES = ("qry", "pos", "neg")
COLUMNS = {"qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"}
SCENES = {
    f"images/{scene.split}/{scene.name}.png": scene
    for scene in draw_scenes(0, "train", TRAIN) + draw_scenes(0, "test", TEST, distinct=True)
}
TEST_IMAGES = [path for path in SCENES if path.startswith("images/test/")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("world"))


def written(directory: Path, seed: int = 0) -> Path:
    write_scenes(directory, seed, TRAIN, TEST, report=lambda line: None)
    return directory


def digest(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def true_of(scene: Scene, text: str) -> bool:
    return text in captions(scene.things)


def test_the_same_seed_writes_the_same_bytes(world: Path, tmp_path: Path) -> None:
    assert digest(written(tmp_path)) == digest(world)


def test_another_seed_writes_another_world(world: Path, tmp_path: Path) -> None:
    assert not set(digest(world).values()) & set(digest(written(tmp_path, seed=1)).values())


def test_images(world: Path) -> None:
    assert {str(path.relative_to(world)) for path in world.glob("images/t*/*.png")} == set(SCENES)
    with Image.open(world / TEST_IMAGES[0]) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))


def test_llava(world: Path) -> None:
    rows = json.loads((world / "llava_train.json").read_text())
    assert len(rows) == TRAIN
    for index, row in enumerate(rows):
        assert set(row) == {"id", "image", "conversations", "negatives"}
        scene, turns = SCENES[row["image"]], row["conversations"]
        assert row["id"] == scene.name and scene.split == "train"
        assert [turn["from"] for turn in turns] == ["human", "gpt"]
        long = index % 10 == 9
        assert turns[0]["value"] == "<image>\n" + (PARAGRAPH_PROMPT if long else CAPTION_PROMPT)
        assert turns[1]["value"].startswith("The picture shows") if long else true_of(scene, turns[1]["value"])
        assert row["negatives"] and not any(true_of(scene, text) for text in row["negatives"])


def test_questions_to_train_on(world: Path) -> None:
    rows = json.loads((world / "vqa_train.json").read_text())
    assert len(rows) == TRAIN
    for row in rows:
        texts = [turn["value"] for turn in row["conversations"]]
        assert SCENES[row["image"]].split == "train"
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * 3
        assert texts[0].startswith("<image>\n") and not any("<image>" in text for text in texts[1:])
        assert len(set(texts[::2])) == 3
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            assert solve(SCENES[row["image"]].things, question.removeprefix("<image>\n")) == answer


def test_karpathy(world: Path) -> None:
    data = json.loads((world / "dataset_scenes.json").read_text())
    assert data["dataset"] == "scenes"
    assert Counter(row["split"] for row in data["images"]) == {"train": TRAIN, "test": TEST}
    assert len({row["imgid"] for row in data["images"]}) == TRAIN + TEST
    for row in data["images"]:
        assert set(row) == {"filename", "filepath", "split", "sentences", "imgid", "cocoid"}
        scene = SCENES[f"{row['filepath']}/{row['filename']}"]
        assert scene.split == row["split"]
        texts = [sentence["raw"] for sentence in row["sentences"]]
        assert len(set(texts)) == 2 and all(true_of(scene, text) for text in texts)
        for sentence in row["sentences"]:
            assert sentence["tokens"] == re.findall(r"\w+", sentence["raw"])


@pytest.mark.parametrize(
    ("source", "count"),
    [
        (Source(path="llava_train.json"), TRAIN),
        (Source(path="vqa_train.json"), TRAIN),
        (Source(path="dataset_scenes.json", format="karpathy"), TRAIN),
        (Source(path="dataset_scenes.json", format="karpathy", split="test"), TEST),
    ],
)
def test_the_files_are_read_like_any_others(world: Path, source: Source, count: int) -> None:
    records = open_source(Source(path=str(world / source.path), format=source.format, split=source.split))
    examples = [records.example(index, Random(index)) for index in range(len(records))]
    assert len(examples) == count
    for example in examples:
        assert example.pair and example.dialogue
        (ref,) = example.pair.query.images
        assert isinstance(ref.source, Path) and ref.source.is_file()


def test_captions(world: Path) -> None:
    rows = lines(world / "captions_test.jsonl")
    assert [row["image"] for row in rows] == TEST_IMAGES
    for row in rows:
        assert set(row) == {"question_id", "image", "text", "answers", "objects"}
        things = SCENES[row["image"]].things
        assert row["text"] == CAPTION_PROMPT and sorted(row["answers"]) == sorted(captions(things))
        assert row["objects"] == sorted({thing.kind for thing in things})


def test_paragraphs(world: Path) -> None:
    rows = lines(world / "paragraphs_test.jsonl")
    assert [row["image"] for row in rows] == TEST_IMAGES and len({row["caption"] for row in rows}) == TEST
    for row in rows:
        things = SCENES[row["image"]].things
        assert set(row) == {"image", "caption"} and row["caption"].count(".") >= 1 + len(things)
        assert all(f"{thing.size} {thing.color} {thing.kind}" in row["caption"] for thing in things)


def test_vqa(world: Path) -> None:
    rows = lines(world / "vqa_test.jsonl")
    assert Counter(row["image"] for row in rows) == dict.fromkeys(TEST_IMAGES, 2)
    assert {row["category"] for row in rows} == set(QUESTION_KINDS)
    assert len({row["question_id"] for row in rows}) == len(rows)
    assert all(set(row) == {"question_id", "image", "text", "answer", "category"} for row in rows)


def pope(world: Path, kind: str) -> list[tuple[str, str, str]]:
    """Return the (image, kind in question, label) of each line."""
    asked = []
    for row in lines(world / "pope" / f"scenes_pope_{kind}.json"):
        assert set(row) == {"question_id", "image", "text", "label"}
        match = re.fullmatch(r"Is there an? (\w+) in the image\?", row["text"])
        assert match and match[1] in KINDS
        asked.append((row["image"], match[1], row["label"]))
    return asked


@pytest.mark.parametrize("kind", POPE)
def test_pope_is_true_balanced_and_without_repeats(world: Path, kind: str) -> None:
    asked = pope(world, kind)
    assert len(set(asked)) == len(asked)
    for image in TEST_IMAGES:
        shown = {thing.kind for thing in SCENES[image].things}
        labels = {probe: label for path, probe, label in asked if path == image}
        assert {probe for probe, label in labels.items() if label == "yes"} == shown
        assert Counter(labels.values()) == {"yes": len(shown), "no": len(shown)}


def test_pope_probes_grow_harder(world: Path) -> None:
    shown = {image: {thing.kind for thing in SCENES[image].things} for image in TEST_IMAGES}
    frequency = Counter(kind for kinds in shown.values() for kind in kinds)
    together = Counter((a, b) for kinds in shown.values() for a in kinds for b in kinds if a != b)
    absent = {kind: [(image, probe) for image, probe, label in pope(world, kind) if label == "no"] for kind in POPE}
    common = {kind: sum(frequency[probe] for _, probe in absent[kind]) for kind in POPE}
    company = {kind: sum(together[a, probe] for image, probe in absent[kind] for a in shown[image]) for kind in POPE}
    assert common["popular"] == max(common.values()) > common["random"]
    assert company["adversarial"] == max(company.values()) > company["random"]


@pytest.mark.parametrize("change", SUGARCREPE)
def test_sugarcrepe(world: Path, change: str) -> None:
    rows = json.loads((world / "sugarcrepe" / f"{change}.json").read_text())
    assert list(rows) == [str(number) for number in range(len(rows))]
    assert len(rows) == TEST if change.startswith("replace") else 0 < len(rows) < TEST
    for row in rows.values():
        assert set(row) == {"filename", "caption", "negative_caption"}
        scene = SCENES[row["filename"]]
        assert true_of(scene, row["caption"]) and not true_of(scene, row["negative_caption"])
        words, false = row["caption"].split(), row["negative_caption"].split()
        assert len(words) == len(false)
        assert sum(a != b for a, b in zip(words, false, strict=True)) <= 4  # two places have two words each


def true_pair(scene: Scene, text: str) -> bool:
    """Whether "the A is left of the B" or "the A and the B" holds in a scene."""
    named = {f"the {thing.color} {thing.kind}": thing for thing in scene.things}
    for first, second in permutations(named, 2):
        relation = relation_between(named[first], named[second])
        if text in (f"{first} and {second}", f"{first} is {relation} {second}"):
            return True
    return False


@pytest.mark.parametrize("part", ["relation", "attribution"])
def test_aro(world: Path, part: str) -> None:
    rows = json.loads((world / "aro" / f"visual_genome_{part}.json").read_text())
    assert rows
    for row in rows:
        kind = {"relation": "relation_name", "attribution": "attributes"}[part]
        captioned = {"image_path", "true_caption", "false_caption"}
        assert set(row) == captioned | {f"bbox_{side}" for side in "xywh"} | {kind}
        scene, true, false = SCENES[row["image_path"]], row["true_caption"], row["false_caption"]
        assert true_pair(scene, true) and not true_pair(scene, false)
        assert Counter(true.split()) == Counter(false.split())  # of the same words
        for thing in scene.things:
            if f"{thing.color} {thing.kind}" in true:
                at = 32 * ("right" in thing.place), 32 * ("bottom" in thing.place)
                within = (row["bbox_x"], row["bbox_w"]), (row["bbox_y"], row["bbox_h"])
                assert all(
                    low <= place and place + 32 <= low + size for place, (low, size) in zip(at, within, strict=True)
                )


def test_winoground(world: Path) -> None:
    rows = lines(world / "winoground" / "examples.jsonl")
    assert [row["id"] for row in rows] == list(range(len(rows))) and rows
    for row in rows:
        assert set(row) == {"id", "caption_0", "caption_1", "image_0", "image_1"}
        first, second = row["caption_0"], row["caption_1"]
        assert first != second and Counter(re.findall(r"\w+", first)) == Counter(re.findall(r"\w+", second))
        images = [(world / "winoground" / "images" / f"{row[f'image_{side}']}.png").read_bytes() for side in (0, 1)]
        (scene,) = (s for path, s in SCENES.items() if (world / path).read_bytes() == images[0])
        assert true_of(scene, first) and not true_of(scene, second) and images[0] != images[1]


def test_vqa_v2(world: Path) -> None:
    asked = json.loads((world / "vqa" / "scenes_questions.json").read_text())
    given = json.loads((world / "vqa" / "scenes_annotations.json").read_text())["annotations"]
    assert asked["data_subtype"] == "val2014" and len(asked["questions"]) == len(given) == 2 * TEST
    for question, annotation in zip(asked["questions"], given, strict=True):
        assert set(question) == {"question_id", "image_id", "question"}
        assert (question["question_id"], question["image_id"]) == (annotation["question_id"], annotation["image_id"])
        assert annotation["answer_type"] in ("yes/no", "number", "other")
        assert [answer["answer_id"] for answer in annotation["answers"]] == list(range(1, 11))
        answers = {answer["answer"] for answer in annotation["answers"]}
        scene = SCENES[TEST_IMAGES[question["image_id"]]]
        assert answers == {solve(scene.things, question["question"])}
        with Image.open(world / "val2014" / f"COCO_val2014_{question['image_id']:012}.jpg") as image:
            assert (image.format, image.size) == ("JPEG", (64, 64))


def table(world: Path, split: str, task: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(world / split / f"{task}.parquet").to_pylist()
    assert rows
    return rows


@pytest.mark.parametrize("task", TASKS)
def test_mmeb_train(world: Path, task: str) -> None:
    for row in table(world, "mmeb_train", task):
        sides = [(row[f"{side}{'' if side == 'qry' else '_text'}"], row[f"{side}_image_path"]) for side in SIDES]
        assert set(row) == COLUMNS and all(check_side(world, *side) for side in sides)
        assert sides[1] != sides[2]


def check_side(world: Path, text: str, image: str) -> bool:
    """An image stands in the text exactly where a path is given, and the file is there."""
    return text.count("<|image_1|>") == bool(image) and (not image or (world / image).is_file())


@pytest.mark.parametrize("task", TASKS)
def test_mmeb_eval(world: Path, task: str) -> None:
    for row in table(world, "mmeb_eval", task):
        assert set(row) == {"qry_text", "qry_img_path", "tgt_text", "tgt_img_path"}
        candidates = list(zip(row["tgt_text"], row["tgt_img_path"], strict=True))
        assert 2 <= len(candidates) <= 8 and len(set(candidates)) == len(candidates)
        assert check_side(world, row["qry_text"], row["qry_img_path"])
        assert all(check_side(world, *candidate) for candidate in candidates)


@pytest.mark.parametrize("split", ["mmeb_train", "mmeb_eval"])
def test_mmeb_retrieval_has_one_right_image(world: Path, split: str) -> None:
    for row in table(world, split, "retrieval"):
        text = row["qry" if split == "mmeb_train" else "qry_text"].removeprefix(
            "Find an image that matches the caption: "
        )
        right, *wrong = [row["pos_image_path"], row["neg_image_path"]] if split == "mmeb_train" else row["tgt_img_path"]
        assert true_of(SCENES[right], text) and not any(true_of(SCENES[path], text) for path in wrong)


def test_mmeb_grounding_crops_the_named_quarter(world: Path) -> None:
    for row in table(world, "mmeb_eval", "grounding"):
        named = row["qry_text"].rsplit(": ", 1)[1]
        (thing,) = [t for t in SCENES[row["qry_img_path"]].things if f"{t.color} {t.kind}" == named]
        left, top = 32 * ("right" in thing.place), 32 * ("bottom" in thing.place)
        with Image.open(world / row["qry_img_path"]) as image, Image.open(world / row["tgt_img_path"][0]) as crop:
            assert crop.tobytes() == image.crop((left, top, left + 32, top + 32)).tobytes()


@pytest.mark.parametrize("count", [1, 2])
def test_a_world_of_very_few_images_can_be_written(tmp_path: Path, count: int) -> None:
    write_scenes(tmp_path, 0, count, count, report=lambda line: None)
    assert len(list(tmp_path.glob("images/t*/*.png"))) == 2 * count
