"""What a collection records about itself, and which directories are collections."""

import json
from dataclasses import asdict, replace

import pytest
from samples import png

from cafe.errors import CafeError
from cafe.index.manifest import (
    Calibration,
    Logistic,
    Manifest,
    Root,
    VectorIndex,
    current_generation,
    delete_collection,
    ensure_usable,
    next_generation,
    read_manifest,
    switch_generation,
    write_manifest,
)
from cafe.lvlm.prompts import Prompts

MANIFEST = Manifest(
    model="/models/a",
    fingerprint="f",
    prompts=Prompts(),
    dim=2,
    golden=((1.0, 0.0),),
    created="2026-11-29T00:00:00+00:00",
    roots=(Root("/photos", exclude=("a",), describe=True), Root("/x.csv", is_source=True, overrides=("a=b",))),
    calibration=Calibration(9, Logistic(1.5, -2.0)),
    vector_index=VectorIndex(9, 8, 0.99),
)


def make(collection, *names):
    """Make generations, as far as they have a manifest."""
    for name in names:
        (collection / name / "images.lance").mkdir(parents=True)
        write_manifest(collection / name, MANIFEST)


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    make(tmp_path, "1")
    assert read_manifest(tmp_path / "1") == MANIFEST
    write_manifest(tmp_path / "1", replace(MANIFEST, roots=(), calibration=None, vector_index=None))
    assert read_manifest(tmp_path / "1").calibration is None
    assert [file.name for file in (tmp_path / "1").iterdir() if file.is_file()] == ["collection.json"]


def test_a_collection_of_a_newer_version_asks_for_an_upgrade(tmp_path):
    make(tmp_path, "1")
    tree = {**asdict(MANIFEST), "format": 2, "a_field_of_the_future": []}
    (tmp_path / "1" / "collection.json").write_text(json.dumps(tree))
    with pytest.raises(CafeError, match=r"made by a newer version of cafe \(format 2; .*upgrade cafe"):
        read_manifest(tmp_path / "1")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"x"', "{}", '{"dim": "many"}', '{"format": "new"}', "[" * 100_000, b"\xff\xfe"],
    ids=range(10),
)
def test_a_damaged_manifest_is_one_clear_error(tmp_path, text):
    make(tmp_path, "1")
    (tmp_path / "1" / "collection.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CafeError, match="collection"):
        read_manifest(tmp_path / "1")


@pytest.mark.parametrize("name", ["", "..", "1/../..", "x", "-1", "/etc", "\xff"])
def test_a_damaged_name_of_the_generation_leads_nowhere(tmp_path, name):
    (tmp_path / "current").write_text(name)
    with pytest.raises(CafeError, match="damaged: its file current names no generation"):
        current_generation(tmp_path)


def test_switching_deletes_older_generations_alone(tmp_path):
    assert current_generation(tmp_path) is None and next_generation(tmp_path) == tmp_path / "1"
    make(tmp_path, "1", "2")
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "a.png").write_bytes(png("red"))
    switch_generation(tmp_path, tmp_path / "2")
    assert current_generation(tmp_path) == tmp_path / "2" and next_generation(tmp_path) == tmp_path / "3"
    assert not (tmp_path / "1").exists() and (tmp_path / "2024" / "a.png").exists()


def test_folders_named_by_years_are_no_collection_and_stay_as_they_are(tmp_path):
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "a.png").write_bytes(png("red"))
    with pytest.raises(CafeError, match=r"holds something that is not a collection \(2024\); nothing was written"):
        ensure_usable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CafeError, match="is a file, not the directory of a collection"):
        ensure_usable(tmp_path / "file")


def test_what_an_interrupted_attempt_left_is_usable(tmp_path):
    ensure_usable(tmp_path / "nothing")
    (tmp_path / "writer.lock").touch()
    make(tmp_path, "1")
    (tmp_path / "1" / ".collection.json.partial").touch()
    ensure_usable(tmp_path)


def test_deleting_a_collection_leaves_what_is_not_of_it(tmp_path):
    make(tmp_path / "a", "1", "2")
    (tmp_path / "a" / "writer.lock").touch()
    switch_generation(tmp_path / "a", tmp_path / "a" / "2")
    (tmp_path / "a" / "notes.txt").touch()
    delete_collection(tmp_path / "a")
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["notes.txt"]
    make(tmp_path / "b", "1")
    switch_generation(tmp_path / "b", tmp_path / "b" / "1")
    delete_collection(tmp_path / "b")
    assert not (tmp_path / "b").exists()
