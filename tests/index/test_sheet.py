"""Contact sheets: the image's pixels, and the page in a real browser."""

import re
import subprocess
from dataclasses import replace
from datetime import datetime
from html import unescape
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from cafe.errors import CafeError, RecordError
from cafe.index import sheet as module
from cafe.index.searching import Hit
from cafe.index.sheet import check_suffix, file_name, write_sheet

HIT = Hit(
    0.75, 0.5, "/photos/boat.jpg", None, "a red boat", "", datetime(2024, 5, 31), 640, 480, {}, "k", "/photos/boat.jpg"
)
COLORS = ["red", "lime", "blue", "yellow", "cyan"]
ODD_NAMES = [
    "日本の写真.png",
    "émoji 🚤.jpg",
    "<img src=x onerror=alert(1)>.jpg",
    "a\"b'c.png",
    "new\nline.png",
    "\u202egnp.jpg",
]
ODD_NAMES += ["x" * 300 + ".jpg", "half \udc80.png", ".jpg", "naïve Ωλ привет.png"]


def hit_of(name, **changes):
    path = f"/photos/{name}"
    return replace(HIT, path=path, id=path, **changes)


def load_color(hit):
    """An image of one color, by the hit's number."""
    return Image.new("RGB", (200, 100), COLORS[int(hit.key)])


def load_gray(hit):
    return Image.new("RGB", (300, 200), "gray")


HITS = [hit_of(f"{number}.jpg", key=str(number), score=number / 4) for number in range(5)]


def test_the_image_is_a_grid_of_the_images_in_order(tmp_path):
    write_sheet(tmp_path / "out.png", "boats", HITS, load_color)
    with Image.open(tmp_path / "out.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    centers = []
    for color in COLORS:
        value = np.array(Image.new("RGB", (1, 1), color))[0, 0]
        rows, columns = np.nonzero((np.abs(pixels - value) < 3).all(2))
        assert len(rows) == (400 - 4) * 200  # as wide as a card but for its outline, in its own shape
        centers.append((int(rows.mean()), int(columns.mean())))
    assert centers == sorted(centers) and len({row for row, _ in centers}) == 2 and centers[0][1] == centers[3][1]


def test_the_bar_on_a_card_is_as_long_as_the_score(tmp_path):
    for score in (-0.5, 0.0, 0.25, 1.0, 3.0):
        write_sheet(tmp_path / "out.png", "", [replace(HIT, score=score)], load_gray)
        pixels = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
        is_accent = (np.abs(pixels - np.array([0x2A, 0x78, 0xD6])) < 3).all(2)
        assert abs(is_accent.sum(1).max() - 400 * min(max(score, 0), 1)) <= 4


@pytest.mark.parametrize("kind", ["png", "html"])
def test_any_name_can_be_shown(kind, tmp_path):
    hits = [hit_of(name, caption=name) for name in ODD_NAMES]
    for title in ("\ud83d\x1b[2J" + "long " * 200, "日本", ""):
        write_sheet(tmp_path / f"out.{kind}", title, hits, load_gray)
    assert (tmp_path / f"out.{kind}").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["png", "html"])
def test_nothing_found_and_images_that_are_gone_are_a_sheet_too(kind, tmp_path):
    def gone(hit):
        raise RecordError("It is gone.")

    write_sheet(tmp_path / f"empty.{kind}", "boats", [], load_gray)
    write_sheet(tmp_path / f"gone.{kind}", "boats", HITS, gone)
    if kind == "html":
        assert "0 images" in (tmp_path / "empty.html").read_text()
        assert (tmp_path / "gone.html").read_text().count("cannot be read") == 5


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (3000, 2), (2, 3000), (96, 96), (97, 40)])
def test_images_of_any_size_fit_their_card(size, tmp_path):
    for kind in ("png", "html"):
        write_sheet(tmp_path / f"out.{kind}", "", [HIT], lambda hit: Image.new("RGB", size, "red"))


@pytest.mark.parametrize("name", ["out.jpg", "out", "out.png.txt", ".png"])
def test_another_suffix_is_one_sentence_and_nothing_is_written(name, tmp_path):
    with pytest.raises(CafeError, match=r"end its name in \.png or \.html"):
        write_sheet(tmp_path / name, "", HITS, load_color)
    assert not list(tmp_path.iterdir())
    check_suffix(tmp_path / "out.PNG")


def test_a_sheet_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "out.html"
    write_sheet(file, "first", HITS, load_color)
    before = file.read_bytes()

    def fail(hit):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sheet(file, "second", HITS, fail)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_many_images_are_cut_off_and_the_sheet_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_SHOWN", 3)
    write_sheet(tmp_path / "out.html", "boats", HITS, load_color)
    page = (tmp_path / "out.html").read_text()
    assert "The first 3 of 5 images" in page and page.count("<li>") == 3


def test_pages_and_records_are_named_by_their_numbers():
    assert file_name(replace(HIT, path="/a/report.pdf", id="/a/report.pdf#page=7", page=7)) == "report.pdf#page=7"
    assert file_name(replace(HIT, path="/a/x.csv", id="/a/x.csv#record=3")) == "x.csv#record=3"
    assert file_name(HIT) == "boat.jpg"


@given(st.text(), st.integers(20, 400))
def test_a_shortened_text_fits_and_keeps_its_ends(text, width):
    font = ImageFont.load_default(22)
    fitted = module._fit(text, font, width)
    if fitted != text:
        beginning, end = fitted.split("…")[0], fitted.split("…")[-1]
        assert text.startswith(beginning) and text.endswith(end)
        assert font.getlength(fitted) <= width or fitted == "…"


def test_a_page_without_a_caption_shows_the_beginning_of_its_text(tmp_path):
    hits = [replace(HIT, caption=None, text="Invoice 17 " + "and so on " * 1000), replace(HIT, text="not shown")]
    write_sheet(tmp_path / "out.html", "", hits, load_gray)
    page = (tmp_path / "out.html").read_text()
    assert "Invoice 17" in page and "a red boat" in page and "not shown" not in page and len(page) < 20_000


def test_the_page_links_files_and_pages_but_not_records(tmp_path):
    hits = [
        hit_of("a b#.jpg"),
        replace(HIT, path="/a/report.pdf", id="/a/report.pdf#page=7", page=7),
        replace(HIT, path="/a/x.csv", id="/a/x.csv#record=3"),
        replace(HIT, path="dataset:x", id="dataset:x"),
    ]
    write_sheet(tmp_path / "out.html", "boats", hits, load_gray)
    links = re.findall(r'href="([^"]*)"', (tmp_path / "out.html").read_text())
    assert links == ["file:///photos/a%20b%23.jpg", "file:///a/report.pdf#page=7"]


def test_the_page_in_a_browser_shows_all_runs_nothing_and_loads_nothing(tmp_path, chromium):
    captions = ["<script>document.title='hacked'</script>", "a & b"]
    hits = [hit_of(name, caption=captions[number % 2]) for number, name in enumerate(ODD_NAMES)]
    write_sheet(tmp_path / "out.html", "<b>boats</b>", hits, load_gray)
    source = (tmp_path / "out.html").read_text()
    assert "<script" not in source and "http://" not in source and "https://" not in source
    page = unescape(chromium("--dump-dom", (tmp_path / "out.html").as_uri()))
    assert "<title><b>boats</b></title>" in page and "a & b" in page and page.count("<li>") == len(ODD_NAMES)
    # At the width of a phone, in the page's dark colors, nothing is wider than the screen.
    shot = tmp_path / "shot.png"
    chromium(
        f"--screenshot={shot}",
        "--window-size=390,900",
        "--blink-settings=preferredColorScheme=0",
        (tmp_path / "out.html").as_uri(),
    )
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape[:2] == (900, 390) and pixels[5, 5].max() < 40
    assert (np.abs(pixels.astype(int) - 128) <= 4).all(2).sum() > 10_000  # the gray images


@pytest.fixture
def chromium(tmp_path):
    """A function that runs a headless Chromium and returns what it prints."""
    from shutil import which

    program = which("chromium") or which("chromium-browser") or which("google-chrome")
    if program is None:
        pytest.fail("This test opens the page in a real browser: install chromium.")

    def run(*options):
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        done = subprocess.run([program, *flags, *options], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_png_is_one(tmp_path):
    write_sheet(tmp_path / "out.PNG", "boats", HITS[:1], load_color)
    assert Image.open(BytesIO(Path(tmp_path / "out.PNG").read_bytes())).format == "PNG"
