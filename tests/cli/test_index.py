"""The commands index and collections, in this process: counts, failures, exit status, and questions."""

import json
import os
import shutil
import sys

import pytest
from PIL import Image
from samples import noise

from cafe.cli import index as module
from cafe.cli.main import main
from cafe.index.locations import collections_home


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """Collections that have a name go to a temporary directory."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def photos(tmp_path):
    """A folder of three images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        noise(number, 24, 18).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def run(random_base, capsys):
    """A function that runs a command and returns its status, its output and its errors."""

    def call(*words, model=False):
        options = ["--workers", "0"] if words[0] == "index" or words[:2] == ("collections", "reindex") else []
        status = main([*map(str, words), *options, *(["--model", str(random_base)] if model else [])])
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith(("cafe:", "Usage", "Error"))]
        return status, printed.out, errors

    return call


def test_indexing_again_counts_what_changed(run, photos):
    status, out, _ = run("index", photos, model=True)
    assert status == 0
    assert out.startswith("3 added, 0 updated, 0 moved, 0 removed, 0 failed, 0 unchanged in ")
    assert f"(3 images in {collections_home() / 'default'})" in out and out.count("\n") == 1
    (photos / "0.png").rename(photos / "moved.png")
    noise(9, 24, 18).save(photos / "new.png")
    (photos / "2.png").unlink()
    status, out, _ = run("index", photos, "--json")
    assert (status, json.loads(out)) == (0, dict(added=1, updated=0, moved=1, removed=1, failed=0, unchanged=1))


def test_without_a_path_all_that_was_indexed_is_indexed_again(run, photos, tmp_path):
    other = shutil.copytree(photos, tmp_path / "other")
    run("index", photos, model=True)
    run("index", other)
    noise(9, 24, 18).save(other / "new.png")
    status, out, _ = run("index", "--json")
    assert status == 0 and json.loads(out)["added"] == 1 and json.loads(out)["unchanged"] == 6


def test_failures_are_listed_with_their_reason_and_control_characters_escaped(run, photos):
    (photos / "bad\x1b[2J.png").write_bytes(b"no image")
    for number in range(12):
        (photos / f"bad{number}.jpg").write_bytes(b"no image")
    status, out, errors = run("index", photos, model=True)
    assert status == 0 and "13 failed" in out
    assert len(errors) == 11 and "3 more could not be read" in errors[-1]
    assert any(r"bad\x1b[2J.png" in line for line in errors) and not any("\x1b" in line for line in errors)
    status, out, _ = run("collections", "info", "--failures")
    assert status == 0 and len(out.splitlines()) == 13 and "\x1b" not in out


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["index", "/nowhere/photos"], 1, "There is no collection"),
        (["index"], 1, "There is no collection"),
        (["index", ".", "--collection", "a*b"], 1, "A collection cannot be called 'a*b'"),
        (["index", ".", "nonsense"], 2, "'nonsense' is not of the form key=value."),
        (["index", ".", "--batch-size", "0"], 2, "is not in the range x>=1"),
        (["collections", "info", "nothing"], 1, "There is no collection"),
        (["collections", "verify", "nothing"], 1, "There is no collection"),
        (["collections", "remove", "nothing"], 1, "There is no collection"),
        (["collections", "remove"], 2, "Missing argument 'NAME'"),
        (["collections", "reindex"], 2, "Missing option '--model'"),
        (["collections", "reindex", "nothing", "--model", "scenes"], 1, "There is no collection"),
    ],
)
def test_mistakes_are_one_sentence(words, status, sentence, run, capsys):
    options = ["--workers", "0"] if words[0] == "index" else []
    assert main([*words, *options]) == status
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error


def test_collections_are_listed_described_verified_and_removed(run, photos, random_base, monkeypatch):
    assert "There is no collection in" in run("collections", "list")[1]
    run("index", photos, "--collection", "photos", model=True)
    damaged = collections_home() / "damaged"
    damaged.mkdir()
    (damaged / "current").write_text("nonsense")
    status, out, _ = run("collections", "list")
    lines = out.splitlines()
    assert status == 0 and len(lines) == 2 and "is damaged" in lines[0]
    assert lines[1].split() == ["photos", "3", "images", str(random_base)]

    status, out, _ = run("collections", "info", "photos")
    info = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert status == 0 and (info["images"], info["places"], info["failures"]) == ("3", "3", "0")
    assert info["model"] == str(random_base) and info["roots"] == str(photos)
    described = json.loads(run("collections", "info", "photos", "--json")[1])
    assert (described["images"], described["roots"]) == (3, [str(photos)])

    assert run("collections", "verify", "photos")[:2] == (0, "The collection photos is sound.\n")
    (photos / "0.png").unlink()
    status, out, errors = run("collections", "verify", "photos")
    assert status == 1 and "0.png" in out and errors == ["cafe: The collection photos has 1 problem."]

    for directory, answer, remains in (("damaged", "n\n", True), ("damaged", "y\n", False)):
        monkeypatch.setattr("click.termui.visible_prompt_func", lambda text, answer=answer: answer.strip())
        assert run("collections", "remove", directory)[0] == 0
        assert (collections_home() / directory).exists() == remains
    assert run("collections", "remove", "photos", "--yes")[0] == 0 and not (collections_home() / "photos").exists()
    assert all((photos / f"{number}.png").exists() for number in (1, 2))


def test_a_question_that_is_not_answered_ends_without_a_traceback(run, photos, monkeypatch):
    run("index", photos, model=True)

    def end(text):
        raise EOFError

    monkeypatch.setattr("click.termui.visible_prompt_func", end)
    status, _, errors = run("collections", "remove", "default")
    assert status == 1 and errors == ["cafe: stopped."] and (collections_home() / "default").exists()


def test_reindexing_prints_its_counts(run, photos, random_base):
    run("index", photos, model=True)
    status, out, _ = run("collections", "reindex", "--json", model=True)
    assert status == 0 and json.loads(out)["added"] == 3


@pytest.fixture
def between_looks(monkeypatch):
    """Make something happen before each look of --watch, and Ctrl-C after the last; return the seconds between them."""

    def prepare(*events):
        remaining, slept = iter(events), []

        def sleep(seconds):
            slept.append(seconds)
            event = next(remaining, None)
            if event is None:
                raise KeyboardInterrupt
            event()

        monkeypatch.setattr(module.time, "sleep", sleep)
        return slept

    return prepare


def nothing():
    """Happen between two looks."""


def test_watching_prints_what_has_changed_until_ctrl_c(run, photos, between_looks):
    slept = between_looks(nothing, lambda: Image.new("RGB", (9, 9)).save(photos / "new.png"), nothing)
    status, out, errors = run("index", photos, "--watch", "--json", model=True)
    assert status == 130 and errors == ["cafe: stopped."]
    assert [json.loads(line)["added"] for line in out.splitlines()] == [3, 1]
    assert len(slept) == 4 and all(seconds >= module.SECONDS_BETWEEN_LOOKS for seconds in slept)


def test_watching_says_once_what_fails_each_time(run, photos, between_looks):
    shutil.copy(photos / "0.png", photos / os.fsdecode(b"\xff.png"))
    between_looks(nothing, nothing, nothing)
    status, out, errors = run("index", photos, "--watch", "--json", model=True)
    assert (status, len(out.splitlines())) == (130, 1)
    assert sum("not UTF-8" in error for error in errors) == 1


def test_watching_waits_for_a_folder_that_has_gone_and_says_so_once(run, photos, tmp_path, between_looks):
    gone = tmp_path / "gone"
    between_looks(lambda: photos.rename(gone), nothing, lambda: gone.rename(photos))
    status, out, errors = run("index", photos, "--watch", "--json", model=True)
    assert (status, len(out.splitlines())) == (130, 1)
    assert [error.partition(": if")[0] for error in errors] == [f"cafe: {photos} does not exist", "cafe: stopped."]


def test_without_lancedb_the_pip_command_is_printed(run, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    status, out, errors = run("index", photos, model=True)
    assert (status, out) == (1, "")
    assert errors == ["cafe: Collections need the package lancedb: pip install 'cafe-lvlm[index]'."]


@pytest.mark.parametrize(
    ("words", "sentences"),
    [
        (["index"], ["Index images, so that they can be searched and asked.", "--describe", "--watch"]),
        (["collections"], ["info", "list", "reindex", "remove", "verify"]),
        (["search"], ["./boat.jpg", "The score, from 0 to 1", "--min-score", "[default: (any)]"]),
        (["ask"], ["Answer a question", "--each"]),
        (["duplicates"], ["--min-similarity"]),
    ],
)
def test_help_names_options_and_their_defaults(words, sentences, capsys):
    assert main([*words, "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(sentence in printed for sentence in sentences)
