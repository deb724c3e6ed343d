"""The concepts: their drawings and words, which of them training shows, and the manifest of all that."""

import hashlib
import json
import re
import tarfile

import numpy as np
import pytest

from another_hand.concepts import (
    DEVELOPMENT_HAND,
    GROUPS,
    LANGUAGES,
    TEST_HANDS,
    TRAINING_HANDS,
    draw_unseen,
    read_list,
)
from another_hand.manifest import check, distance, on_white, read_manifest, write_manifest
from another_hand.packages import DRAWINGS, PackageError, fetch


def test_the_list_names_each_concept_once_and_holds_out_a_part_of_each_subgroup():
    names = [name for names in read_list().values() for name in names]
    assert len(set(names)) == len(names) == 156
    for subgroup, members in read_list().items():
        unseen = draw_unseen(subgroup, members)
        assert unseen < set(members)
        assert 1 <= len(unseen) <= 2
        assert not unseen & {"pizza", "fork and knife"}


def test_no_hand_is_on_both_sides():
    outside = {DEVELOPMENT_HAND, *TEST_HANDS}
    assert not outside & set(TRAINING_HANDS)
    # Of the same house as the development hand.
    assert "noto" not in {*outside, *TRAINING_HANDS}


def test_every_concept_has_words_and_is_drawn_by_every_test_hand(concepts):
    assert len(concepts) == 156
    for concept in concepts:
        assert concept.group in GROUPS.values()
        assert concept.keywords
        assert set(concept.foreign) == set(LANGUAGES)
        assert {DEVELOPMENT_HAND, *TEST_HANDS} <= set(concept.icons)
        assert len(set(TRAINING_HANDS) & set(concept.icons)) >= 3


def test_keywords_share_no_word_with_the_name(concepts):
    for concept in concepts:
        own = set(re.findall(r"\w+", concept.name.lower()))
        words = {word for keyword in concept.keywords for word in re.findall(r"\w+", keyword.lower())}
        assert not own & {form for word in words for form in (word, word + "s", word.removesuffix("s"))}
        assert "bee" not in words or "bee" not in concept.name


def test_the_manifest_is_of_these_concepts_and_drawings(packages, concepts):
    manifest = read_manifest()
    described = manifest["concepts"]
    assert {name: entry["split"] == "seen" for name, entry in described.items()} == {c.name: c.seen for c in concepts}
    # One drawing's hash, by other means.
    archive = packages / f"iconify-json-openmoji-{DRAWINGS['openmoji'].rpartition('@')[2]}.tgz"
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == manifest["archives"][DRAWINGS["openmoji"]]
    with tarfile.open(archive) as opened:
        icons = json.load(opened.extractfile("package/icons.json"))["icons"]
    name, digest = described["pizza"]["icons"]["openmoji"].split()
    assert hashlib.sha256(icons[name]["body"].encode()).hexdigest().startswith(digest)


def test_a_manifest_is_read_back_and_a_difference_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("another_hand.manifest.MANIFEST", tmp_path / "manifest.json")
    made = {"archives": {"a@1": "12"}, "concepts": {"fox": {"split": "seen", "icons": {}}}}
    write_manifest({**made, "near_copies": {"openmoji": ["fox"]}})
    assert read_manifest() == {**made, "near_copies": {"openmoji": ["fox"]}}
    check(made, read_manifest())
    with pytest.raises(PackageError, match="'fox' is not as the manifest has it: None instead of"):
        check({"archives": made["archives"], "concepts": {}}, read_manifest())


def test_another_archive_is_refused(packages):
    name = DRAWINGS["openmoji"]
    with pytest.raises(PackageError, match="is not the @iconify-json/openmoji"):
        fetch(packages, {name: "0" * 64})


def test_without_a_network_there_is_a_sentence(packages, tmp_path, monkeypatch):
    for setting, value in (("registry", "http://127.0.0.1:9/"), ("fetch_retries", "0"), ("cache", str(tmp_path / "c"))):
        monkeypatch.setenv(f"npm_config_{setting}", value)
    with pytest.raises(PackageError, match="Is there a network"):
        fetch(tmp_path / "packages", {})


def test_a_download_that_fails_halfway_leaves_no_half_archive(tmp_path, monkeypatch):
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    # Writes half of an archive where it is told to, and fails.
    npm.write_text('#!/bin/sh\nprintf half > "$5/iconify-json-twemoji-1.2.5.tgz"\necho "no answer" >&2\nexit 1\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=":")
    with pytest.raises(PackageError, match=r"could not fetch the drawings \(no answer\)"):
        fetch(tmp_path / "packages", {})
    assert list((tmp_path / "packages").glob("*.tgz")) == []
    assert len(list((tmp_path / "packages").rglob("iconify-json-twemoji-1.2.5.tgz"))) == 1


def test_the_distance_is_of_what_is_seen_on_white():
    black, hidden, white = (np.zeros((4, 4, 4), np.uint8) for _ in range(3))
    black[..., 3] = 255
    white[:] = 255
    assert distance(on_white(hidden), on_white(white)) == 0  # what is transparent has no color
    assert distance(on_white(black), on_white(white)) == 1
    black[:2, :, 3] = 0  # half of it
    assert distance(on_white(black), on_white(white)) == pytest.approx(0.5**0.5)
