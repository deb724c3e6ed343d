"""Test that the report opens in a real browser, is self-contained, and shows what was measured."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cafe.errors import CafeError
from cafe.evaluation.report.page import write_report
from cafe.evaluation.report.run import ReportRun
from cafe.evaluation.runner import write
from cafe.evaluation.suite import EvaluationResult
from cafe.evaluation.suites import VQA


def chromium(tmp_path: Path, *options: str) -> str:
    """Run a headless Chromium and return what it prints."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.fail("This test opens the report in a real browser: install chromium.")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run([program, *flags, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def evaluation_of(data: Path, skill: float, gap: float) -> EvaluationResult:
    """Make up the results of a run; skill from 0 to 1."""
    random = np.random.default_rng(0)
    images, texts = random.normal(size=(2, 40, 8))
    images[:, 0] += gap
    right = skill > 0.5
    bins = np.linspace(-1, 1, 21).tolist()
    counts = {"bins": bins, "matched": [0.0] * 15 + [2.0] * 5, "mismatched": [0.0] * 5 + [1.0] * 10 + [0.0] * 5}
    images_found = [{"image": f"{n}.png", "right": right and n == 0} for n in range(5)]
    texts_found = [{"text": f"caption <{n}>", "right": right and n == 0} for n in range(5)]
    return EvaluationResult(
        results={
            "retrieval/text_to_image/R@1": 90 * skill,
            "captions/exact": 80 * skill,
            "pope/random/yes_ratio": 51.0,
            "geometry/modality_gap": gap,
        },
        samples={
            "data": str(data),
            "histogram": counts,
            "text_queries": [{"text": "a red & blue thing", "hits": images_found}],
            "image_queries": [{"image": "1.png", "hits": texts_found}],
            "captions": [{"image": "2.png", "said": "a thing" if right else "", "right": right}],
            "answers": [{"image": "3.png", "asked": "How many?", "said": "two", "answer": "two", "right": right}],
        },
        embeddings={"images": images.astype(np.float32), "texts": texts.astype(np.float32)},
        outputs={
            "captions": [{"id": n, "marks": {"captions/exact": int(n < 80 * skill)}} for n in range(100)],
            "retrieval/text_to_image": [
                {"id": n, "marks": {"retrieval/text_to_image/R@1": int(n < 90 * skill)}} for n in range(100)
            ],
        },
    )


@pytest.fixture
def runs(tmp_path: Path) -> list[ReportRun]:
    for number, color in enumerate(("red", "green", "blue", "yellow", "white")):
        Image.new("RGB", (64, 64) if number else (640, 480), color).save(tmp_path / f"{number}.png")
    write(evaluation_of(tmp_path, 0.1, 1.0), tmp_path / "before")
    write(evaluation_of(tmp_path, 1.0, 0.25), tmp_path / "after")
    keys = ("loss", "lm_loss", "contrastive_loss", "grad_norm_lm", "grad_norm_contrastive", "accuracy", "lr")
    rows = [{"step": step, **dict.fromkeys(keys, 1 / step), "temperature": 0.07} for step in range(1, 20)]
    rows.insert(3, {"step": 3, "heldout/accuracy": 0.5})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        ReportRun("base", tmp_path / "before"),
        ReportRun("joint", tmp_path / "after", tmp_path / "log.jsonl"),
    ]


def test_the_page_opens_in_a_browser_with_all_its_sections(runs, tmp_path):
    page = tmp_path / "report.html"
    write_report(page, runs)
    dom = chromium(tmp_path, "--dump-dom", page.as_uri())
    tiles = re.findall(r'<div class="tile">.*?</div>\s*</div>', dom, re.DOTALL)
    assert len(tiles) == 3
    assert "90.0<small>%</small>" in tiles[0] and "from 9.0" in tiles[0]
    assert '<span class="good">+81.0</span>' in tiles[0]
    assert '<span class="good">−0.750</span>' in tiles[2]  # a smaller gap is better
    assert re.search(r"<th>base</th><th>joint</th>", dom)
    assert re.search(r'<td>9\.0<small>[\d.–]+</small></td><td class="best">90\.0<small>[\d.–]+</small></td>', dom)
    # 81 of 100 images differ, all for the better, which every test finds significant.
    assert re.search(r'<td class="good">\+81\.0</td><td>\+7\d\.\d to \+8\d\.\d</td><td>&lt; 0.001</td>', dom)
    assert re.search(r"<td>51\.0</td><td>51\.0</td>", dom)
    for section in (
        "results",
        "intervals",
        "differences",
        "map",
        "similarities",
        "text-queries",
        "image-queries",
        "captions",
        "answers",
        "training",
    ):
        assert f'<section id="{section}">' in dom
    assert dom.count("<svg") == 1 + 2 + 2 + 8
    assert dom.count('<li class="right">') == 1 and dom.count('<li class="wrong">') == 9
    assert "a red &amp; blue thing" in dom and "caption &lt;0&gt;" in dom


def test_a_tile_shows_no_color_if_its_interval_includes_zero(runs, tmp_path):
    write(evaluation_of(tmp_path, 0.61, 0.25), tmp_path / "before")
    write(evaluation_of(tmp_path, 0.6, 0.25), tmp_path / "after")  # one image of 100 is lost
    write_report(tmp_path / "report.html", runs)
    page = (tmp_path / "report.html").read_text()
    tiles = re.findall(r'<div class="tile">.*?</div>\s*</div>', page, re.DOTALL)
    assert '<span class="same">−0.9</span>' in tiles[0] and 'class="bad"' not in page
    assert "In color where" in page.split("</header>")[0]


def test_a_suite_alone_decides_its_headline_direction_label_and_unit(tmp_path):
    for name, value in (("before", 0.5), ("after", 0.25)):
        results = {"mine/latency": value, "mine/score": 100 * value, "vqa/all": 50.0}
        write(EvaluationResult(results=results), tmp_path / name)
    runs = [ReportRun(name, tmp_path / name) for name in ("before", "after")]
    labels = {"mine": "My suite", "mine/latency": "Latency"}
    mine = replace(VQA, name="mine", headline=("mine/latency",), labels=labels, in_percent=False)
    for lower_is_better, verdict in (((), "bad"), (("mine/latency",), "good")):
        suites = [replace(mine, lower_is_better=lower_is_better)]
        write_report(tmp_path / "report.html", runs, suites)
        html = (tmp_path / "report.html").read_text()
        [tile] = re.findall(r'<div class="tile">.*?</div>\s*</div>', html, re.DOTALL)
        assert '<div class="label">Latency</div>' in tile and "0.250<small></small>" in tile
        assert f'<span class="{verdict}">−0.250</span>' in tile
        assert f"<tr><th>latency{' <span>↓</span>' if lower_is_better else ''}</th>" in html
        assert "<th>My suite</th>" in html and "<th>vqa</th>" in html


def test_a_screenshot_of_the_page_is_not_blank(runs, tmp_path):
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    write_report(page, runs)
    chromium(tmp_path, f"--screenshot={shot}", "--window-size=1200,2400", page.as_uri())
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (2400, 1200, 3)
    for top in range(0, 2400, 600):
        assert len(np.unique(pixels[top : top + 600].reshape(-1, 3), axis=0)) > 50


def test_the_page_loads_nothing_from_outside_itself(runs, tmp_path):
    page = tmp_path / "report.html"
    write_report(page, runs)
    html = page.read_text()
    assert "<script" not in html and "<link" not in html and "@import" not in html
    sources = re.findall(r"""(?:src|href)=["']([^"']*)|url\(([^)]*)\)""", html)
    assert sources
    assert all((first or second).startswith(("data:image/", "#")) for first, second in sources)


def test_small_images_keep_their_pixels_and_large_ones_are_reduced(runs, tmp_path):
    page = tmp_path / "report.html"
    write_report(page, runs)
    html = page.read_text()
    assert 'alt="1.png" class="pixels" src="data:image/png' in html
    assert 'alt="0.png" class="" src="data:image/jpeg' in html


def test_a_single_run_needs_no_log_samples_or_embeddings(tmp_path):
    write(EvaluationResult(results={"vqa/all": 50.0}), tmp_path / "only")
    page = tmp_path / "report.html"
    write_report(page, [ReportRun("only", tmp_path / "only")])
    html = page.read_text()
    assert "Questions answered" in html
    assert 'class="from"' not in html and "<svg" not in html and '<section id="map">' not in html


def test_more_than_two_runs_have_a_column_each(runs, tmp_path):
    page = tmp_path / "report.html"
    write_report(page, [runs[0], ReportRun("middle", runs[1].directory, runs[1].log), runs[1]])
    html = page.read_text()
    assert "<th>base</th><th>middle</th><th>joint</th>" in html
    assert html.count("<figcaption>") == 3 + 3 + 8


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a "b" & c', r"$\frac$", "$a$"])
def test_a_runs_name_is_escaped(runs, tmp_path, name):
    write_report(tmp_path / "report.html", [runs[1], replace(runs[1], name=name)])  # both have curves, with a legend
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html
    for section in ("results", "intervals", "training"):
        [shown] = re.findall(rf'<section id="{section}">.*?</section>', html, re.DOTALL)
        assert name in unescape(shown), section


def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, runs)
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()


def test_a_missing_or_truncated_file_is_reported_in_one_sentence(runs, tmp_path):
    whole = (tmp_path / "before" / "embeddings.npz").read_bytes()
    for part in (b"", whole[:50]):
        (tmp_path / "before" / "embeddings.npz").write_bytes(part)
        with pytest.raises(CafeError, match=r"A file of the run 'base' in .* cannot be read"):
            write_report(tmp_path / "report.html", runs)
    (tmp_path / "before" / "embeddings.npz").unlink()
    with pytest.raises(CafeError, match=r"'base' lacks the file .*embeddings\.npz"):
        write_report(tmp_path / "report.html", runs)
    with pytest.raises(CafeError, match="at least one"):
        write_report(tmp_path / "report.html", [])


def shown(image: str, data: Path | str, tmp_path: Path) -> str:
    """Return the `<img>` that a report has of a described image."""
    samples = {"data": str(data), "captions": [{"image": image, "said": "a", "right": True}]}
    write(EvaluationResult(results={"captions/exact": 1.0}, samples=samples), tmp_path / "run")
    write_report(tmp_path / "report.html", [ReportRun("run", tmp_path / "run")])
    [tag] = re.findall(r"<img [^>]*>", (tmp_path / "report.html").read_text())
    return tag


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "data" / "images").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "data" / "images"):
        Image.new("RGB", (8, 8)).save(folder / "photo.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "photo.png")
    (tmp_path / "data" / "folder").symlink_to(tmp_path)
    (tmp_path / "data" / "inside.png").symlink_to(tmp_path / "data" / "images" / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("image", ["../photo.png", "images/../../photo.png", "link.png", "folder/photo.png", None])
def test_a_file_outside_the_evaluations_data_is_not_embedded(secret, tmp_path, image):
    tag = shown(image or str(secret), tmp_path / "data", tmp_path)
    assert "src=" not in tag and "is not shown" in tag


@pytest.mark.parametrize("image", ["images/photo.png", "inside.png", "images/../images/photo.png"])
def test_images_of_the_evaluations_data_are_embedded(secret, tmp_path, image):
    assert 'src="data:image/png;base64,' in shown(image, tmp_path / "data", tmp_path)


@pytest.mark.parametrize("image", ["data:text/html,<script>", 'data:image/png;base64,"onerror=x', "javascript:x", "\0"])
def test_other_than_a_thumbnail_is_not_taken_for_one(tmp_path, image):
    tag = shown(image, "", tmp_path)
    assert "src=" not in tag and "onerror=" not in re.sub(r'"[^"]*"', "", tag) and "<script" not in tag[1:]


def test_half_of_a_surrogate_pair_is_written_as_its_escape(tmp_path):
    samples = {"data": "", "captions": [{"image": "a.png", "said": "half \ud83d", "right": True}]}
    write(EvaluationResult(results={"captions/exact": 1.0}, samples=samples), tmp_path)
    write_report(tmp_path / "report.html", [ReportRun("run", tmp_path)])
    assert r"half \ud83d" in (tmp_path / "report.html").read_text()
