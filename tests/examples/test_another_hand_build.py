"""A small build of everything: what is in which folder, and that it is readable, written once and the same."""

import hashlib
import json
import shutil
from random import Random

import pytest

from another_hand.build import MARKER, build
from another_hand.concepts import TEST_HANDS
from another_hand.evaluation_data import plan_folders
from another_hand.manifest import read_manifest
from another_hand.scenes import pair_up
from cafe.data.formats.llava import llava
from cafe.data.formats.pairs import pairs
from cafe.data.source import Source
from cafe.evaluation.io import find_image
from cafe.evaluation.suites import captions, pope, vqa
from cafe.evaluation.suites.captioned_images import USER_DATASET
from cafe.evaluation.suites.chair import find
from cafe.evaluation.suites.coco import read_instances
from cafe.evaluation.suites.mmeb.datasets import find_datasets
from cafe.evaluation.suites.mmeb.readers import read_records

TRAINING = {"llava_scenes.json": (llava, 80), "llava_questions.json": (llava, 120), "names.jsonl": (pairs, 40)}
FOLDERS = ("noto-v1", "openmoji", "emojione", "new-scenes", "unseen")


def read_rows(path):
    """Read JSON, or JSON lines."""
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else list(map(json.loads, text.splitlines()))


def digests(folder):
    """Hash every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_configuration_writes_the_same_bytes(built, packages, config, tmp_path):
    shutil.copytree(packages, tmp_path / "packages")
    build(tmp_path, config)
    assert digests(tmp_path / "data") == digests(built / "data")


def test_only_what_is_not_complete_is_written_again(built, config):
    data = built / "data"
    expected = digests(data)
    times = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    # As a build that was killed leaves it.
    (data / "unseen" / MARKER).unlink()
    (data / "unseen" / "vqa_test.jsonl").write_text("half")
    (data / "unseen" / "images" / "old.png").write_bytes(b"")
    build(built, config)
    assert digests(data) == expected
    unchanged = {path for path, time in times.items() if path.stat().st_mtime_ns == time}
    assert {path for path in times if "unseen" not in path.parts and path != data} <= unchanged


def test_training_shows_and_names_seen_concepts_alone(built, concepts):
    unseen = {concept.name for concept in concepts if not concept.seen}
    foreign = {word for concept in concepts if not concept.seen for word in concept.foreign.values()}
    shared = {word for concept in concepts if concept.seen for word in concept.foreign.values()}
    for name in TRAINING:
        for record in read_rows(built / "data" / "train" / name):
            assert (built / "data" / "train" / record["image"]).is_file()
            said = " ".join(turn["value"] for turn in record["conversations"])
            words = said.replace(",", " ").replace("?", " ").replace(".", " ").split()
            assert not any(f" {concept} " in f" {' '.join(words)} " for concept in unseen)
            assert not (foreign - shared | unseen) & set(record.get("positive", ()))


def test_cafe_reads_the_training_files(built):
    train = built / "data" / "train"
    for name, (read, count) in TRAINING.items():
        records = read_rows(train / name)
        assert len(records) == count
        for record in records:
            pair, dialogue = read(record, Source(path=str(train / name)), Random(0))
            assert pair.query.images and dialogue.turns


@pytest.mark.parametrize("name", FOLDERS)
def test_cafe_reads_the_evaluation_files(built, config, name):
    data = built / "data" / name
    captioned = USER_DATASET.read(data, None)
    assert len(captioned.texts) == len(set(captioned.texts)) == config.test_scenes
    annotated = read_instances(find(data)[0], None)
    assert len(annotated.vocabulary.classes) == 156
    assert [annotated.vocabulary.mentions(text) for text in captioned.texts] == [
        sorted(objects, key=text.index)
        for text, objects in zip(captioned.texts, annotated.objects.values(), strict=True)
    ]
    for suite in (captions, vqa):
        (path,) = suite.find(data)
        for row in read_rows(path):
            find_image(row["image"], data, path)
    kinds = {path.stem.rpartition("_")[2] for path in (data / "pope").iterdir()}
    assert kinds == {"random", "popular", "subgroup"} | ({"adversarial"} if name != "unseen" else set())
    for path in (data / "pope").iterdir():
        assert pope.read(path)
    tables = {path.stem: read_records(path, data=data) for path in find_datasets(data).values()}
    assert len(tables) == 6
    images = set()
    for queries in tables.values():
        for query in queries:
            images.update(query.side.images, *(side.images for side in query.candidates))
            # Every candidate is another one: none but the first is right.
            assert len(query.candidates) == len(queries) / (2 if name == "unseen" else 1)
    assert all((data / image).is_file() for image in images)


@pytest.mark.parametrize("name", FOLDERS)
def test_no_scene_shows_partners_and_no_folder_another_ones_concepts(built, concepts, name):
    seen = [concept.name for concept in concepts if concept.seen]
    partners = pair_up(seen)
    for row in read_rows(built / "data" / name / "captions_test.jsonl"):
        assert not any(partners.get(concept) in row["objects"] for concept in row["objects"])
        assert all((concept in seen) == (name != "unseen") for concept in row["objects"])


def test_folders_are_split_by_hand_and_leave_out_near_copies(concepts):
    copies = read_manifest()["near_copies"]
    assert "cloud" in copies["noto-v1"]
    folders = {folder.name: folder for folder in plan_folders(concepts, copies)}
    assert tuple(folders) == FOLDERS
    for hand in ("noto-v1", *TEST_HANDS):
        assert set(map(tuple, folders[hand].hands.values())) == {(hand,)}
        assert not set(copies[hand]) & set(folders[hand].hands)
    assert {hand for hands in folders["unseen"].hands.values() for hand in hands} == set(TEST_HANDS)
