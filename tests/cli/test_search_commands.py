"""The commands search, ask and duplicates, in this process: what they print, and what they cannot print."""

import json
import os
import shutil
import sys
from dataclasses import replace
from datetime import datetime

import pytest
from PIL import Image
from search_samples import index

from cafe.cli import search as module
from cafe.cli.main import main
from cafe.index.asking import NOTHING_FOUND
from cafe.index.collection import Collection

ODD_NAME = "line\nbreak \x1b[2J 日本.png"


@pytest.fixture(scope="module")
def photos(tmp_path_factory, scenes):
    """A folder of eight scenes with dates, in folders of two years, of which one has an odd name."""
    folder = tmp_path_factory.mktemp("photos")
    for number, file in enumerate(sorted((scenes / "images" / "test").glob("*.png"))[:8]):
        year = folder / f"{2020 + number % 2}"
        year.mkdir(exist_ok=True)
        copy = year / (ODD_NAME if number == 0 else f"IMG_{number}.png")
        shutil.copy(file, copy)
        time = datetime(2020 + number % 2, 1 + number, 1).timestamp()
        os.utime(copy, (time, time))
    return folder


@pytest.fixture(scope="module")
def collection(tmp_path_factory, photos, random_base):
    """The directory of the collection of these scenes."""
    return index(tmp_path_factory.mktemp("collection") / "photos", random_base, photos, describe=True).directory


@pytest.fixture
def run(collection, capsysbinary):
    """A function that runs a command on the collection and returns its status, its output and its errors."""

    def call(command, *words, directory=collection):
        status = main([command, "--collection", str(directory), *map(str, words)])
        printed = capsysbinary.readouterr()
        errors = [line for line in printed.err.decode().splitlines() if line.startswith(("cafe:", "Error:"))]
        return status, printed.out.decode(), errors

    return call


@pytest.fixture(scope="module")
def paths(collection):
    """The paths of all images, the best first for "a red star"."""
    return [hit.path for hit in Collection.open(collection).search("a red star")]


def test_the_table_has_score_date_path_and_caption_in_a_line_each(run, collection):
    status, out, _ = run("search", "a", "red", "star")
    hits = Collection.open(collection).search("a red star")
    assert status == 0 and len(out.splitlines()) == len(hits) == 8
    for line, hit in zip(out.splitlines(), hits, strict=True):
        assert line.startswith(f"{hit.score:5.3f}  {hit.taken_at:%Y-%m-%d}  ")
        if "break" not in hit.path:
            assert hit.path in line
    assert "\x1b" not in out and r"line\nbreak \x1b[2J 日本.png" in out


def test_a_page_without_a_caption_is_shown_with_the_beginning_of_its_text(run, monkeypatch):
    search = Collection.search
    page = dict(caption=None, text="Invoice 17\nof the  harbour " + "x" * 1000)
    monkeypatch.setattr(Collection, "search", lambda *args, **options: [replace(search(*args, **options)[0], **page)])
    out = run("search", "a red star")[1]
    assert "  Invoice 17 of the harbour xxx" in out and len(out.splitlines()) == 1


def test_json_is_an_object_a_line(run, paths):
    status, out, _ = run("search", "a red star", "--json", "-k", "3")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [row["path"] for row in rows] == paths[:3]
    assert {"path", "page", "score", "caption", "taken_at"} <= rows[0].keys()
    assert rows[0]["page"] is None and isinstance(rows[0]["caption"], str)
    assert all(datetime.fromisoformat(row["taken_at"]).day == 1 for row in rows)


def test_paths_alone_end_in_a_newline_or_a_nul(run, paths):
    assert run("search", "a red star", "-f")[1] == "".join(path + "\n" for path in paths)
    assert run("search", "a red star", "-f", "-0")[1].split("\0") == [*paths, ""]


def test_on_a_terminal_paths_are_safe_unless_they_end_in_a_nul(run, paths, monkeypatch):
    monkeypatch.setattr(module.sys.stdout, "isatty", lambda: True, raising=False)
    out = run("search", "a red star", "-f")[1]
    assert r"line\nbreak \x1b[2J 日本.png" in out and "\x1b" not in out
    assert run("search", "a red star", "-f", "-0")[1].split("\0") == [*paths, ""]


def test_pages_of_one_file_are_one_path(run, paths, monkeypatch):
    search = Collection.search
    monkeypatch.setattr(Collection, "search", lambda *args, **options: search(*args, **options)[:2] * 2)
    assert run("search", "a red star", "-f")[1] == "".join(path + "\n" for path in paths[:2])


def test_a_lone_minus_and_an_image_are_parts_of_the_query(run, collection, paths, monkeypatch):
    image = next(path for path in paths if path.endswith("IMG_3.png"))
    status, out, _ = run("search", image, "+", "0.5:at night", "-", "0.25:people", "-f", "-k", "1")
    assert (status, out) == (0, image + "\n")
    monkeypatch.chdir(os.path.dirname(image))
    assert run("search", "./IMG_3.png", "-f", "-k", "1")[1] == image + "\n"
    assert run("search", "-", "a red star", "-f")[0] == 0


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--after", "2021"], {"IMG_1.png", "IMG_3.png", "IMG_5.png", "IMG_7.png"}),
        (["--after", "2021-04", "--before", "2021-06"], {"IMG_3.png"}),
        (["--before", "2020-04"], {ODD_NAME, "IMG_2.png"}),
        (["--in", "2021", "-k", "2"], None),
        (["--min-width", "65"], set()),
        (["--where", "license=cc-by"], set()),
        (["--min-score", "1.1"], set()),
        (["--min-score", "-1"], {ODD_NAME, *(f"IMG_{number}.png" for number in range(1, 8))}),
    ],
)
def test_filters_limit_what_is_found(words, names, run):
    status, out, _ = run("search", "star", "-f", "-0", *words)
    found = {path.rsplit("/", 1)[1] for path in out.split("\0") if path}
    assert status == 0
    if names is None:
        assert len(found) == 2 and all("/2021/" in path for path in out.split("\0") if path)
    else:
        assert found == names


def test_sorting_is_of_what_was_found(run, paths):
    out = run("search", "a red star", "-k", "5", "--sort", "oldest", "--json")[1]
    rows = [json.loads(line) for line in out.splitlines()]
    assert {row["path"] for row in rows} == set(paths[:5])
    dates = [row["taken_at"] for row in rows]
    assert dates == sorted(dates)
    out = run("search", "a red star", "-k", "5", "--sort", "name", "-f", "-0")[1]
    assert out.split("\0")[:-1] == sorted(paths[:5])


def test_reranking_orders_the_same_images(run, paths):
    status, out, _ = run("search", "a red star", "--rerank", "-f", "-0")
    assert status == 0 and set(out.split("\0")[:-1]) == set(paths)


def test_a_contact_sheet_is_written_beside_the_table(run, tmp_path):
    for name in ("out.png", "out.html"):
        status, out, _ = run("search", "a", "red", "star", "--sheet", tmp_path / name)
        assert status == 0 and len(out.splitlines()) == 8 and (tmp_path / name).stat().st_size > 1000
    assert "<h1>a red star</h1>" in (tmp_path / "out.html").read_text()


def test_nothing_found_is_said(run):
    assert run("search", "star", "--in", "nowhere")[:2] == (0, "Nothing was found.\n")
    assert run("search", "star", "--in", "nowhere", "--json")[:2] == (0, "")
    assert run("search", "star", "--in", "nowhere", "-f")[:2] == (0, "")


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["./gone.jpg"], 1, "The image ./gone.jpg does not exist."),
        (["boats", "+"], 1, "A term of the query is empty"),
        (["boats", "--after", "May"], 1, "The date 'May' is not of the form"),
        (["boats", "--where", "license"], 1, "is not of the form COLUMN=VALUE"),
        (["boats", "--sheet", "out.gif"], 1, "end its name in .png or .html"),
        (["boats", "--sort", "size"], 2, "Invalid value for '--sort'"),
        (["boats", "-k", "0"], 2, "is not in the range x>=1"),
        ([], 2, "Missing argument 'QUERY...'"),
    ],
)
def test_mistakes_are_one_sentence(words, status, sentence, run):
    result, out, errors = run("search", *words)
    assert result == status and not out and len(errors) == 1 and sentence in errors[0]


def test_images_are_shown_inline_if_asked_to(run, monkeypatch):
    out = run("search", "a red star", "-k", "1", "--show")[1]
    assert len(out.splitlines()) > 5
    assert len(run("search", "a red star", "-k", "1")[1].splitlines()) == 1  # this is no terminal
    monkeypatch.setitem(sys.modules, "cafe.index.terminal", None)
    status, _, errors = run("search", "a red star", "--show")
    assert status == 1 and "pip install 'cafe-lvlm[terminal]'" in errors[0]
    monkeypatch.setattr(module.sys.stdout, "isatty", lambda: True, raising=False)
    assert run("search", "a red star", "-k", "1")[0] == 0  # where it is only the default, it is left out


def test_an_answer_is_followed_by_its_sources(run, paths):
    status, out, _ = run("ask", "a", "red", "star", "-k", "3", "--max-new-tokens", "4")
    lines = out.splitlines()
    assert status == 0 and [line.split()[0] for line in lines[-3:]] == ["[1]", "[2]", "[3]"]
    assert "\x1b" not in out
    status, out, _ = run("ask", "a red star", "-k", "3", "--max-new-tokens", "4", "--json")
    answer = json.loads(out)
    assert status == 0 and [row["path"] for row in answer["sources"]] == paths[:3]
    assert answer["text"] == "\n".join(lines[:-3]).strip()


def test_each_image_has_a_line_of_its_own(run):
    out = run("ask", "What color?", "--find", "a red star", "-k", "2", "--each", "--max-new-tokens", "2", "--json")[1]
    answer = json.loads(out)
    assert answer["text"].startswith("[1] ") and "\n[2] " in answer["text"] and len(answer["sources"]) == 2


def test_an_answer_without_images_says_so(run):
    assert run("ask", "star", "--min-score", "1.1")[:2] == (0, NOTHING_FOUND + "\n")
    assert json.loads(run("ask", "star", "--in", "nowhere", "--json")[1]) == {"text": NOTHING_FOUND, "sources": []}


def test_duplicates_are_in_groups(tmp_path, run, photos, random_base):
    folder = shutil.copytree(photos, tmp_path / "photos")
    image = Image.open(folder / "2020" / "IMG_2.png").convert("RGB")
    image.resize((128, 128), Image.Resampling.BICUBIC).save(folder / "larger.png")
    shutil.copy(folder / "2021" / "IMG_3.png", folder / "same.png")
    directory = index(tmp_path / "other", random_base, folder).directory
    status, out, _ = run("duplicates", "--min-similarity", "0.8", directory=directory)
    groups = out.split("\n\n")
    assert status == 0
    assert [{line.rsplit("/", 1)[1] for line in group.strip().splitlines()} for group in groups] == [
        {"IMG_2.png", "larger.png"},
        {"IMG_3.png", "same.png"},
    ]
    out = run("duplicates", "--min-similarity", "0.8", "--json", directory=directory)[1]
    assert [len(json.loads(line)) for line in out.splitlines()] == [2, 2]


def test_a_search_whose_output_nobody_reads_ends_quietly(collection, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["search", "star", "--collection", str(collection), "--json"]) == 141
    assert "Traceback" not in capfd.readouterr().err
