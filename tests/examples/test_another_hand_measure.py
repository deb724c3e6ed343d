"""Measuring folders with a model that says what it is told, and showing what was found and said."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from another_hand import measure, pictures
from another_hand.scenes import pair_up
from cafe.content import Content, ImageRef
from cafe.evaluation.runner import NullModel

SEEN = measure.seen_names()
PARTNERS = pair_up(SEEN)
ALONE = next(name for name in SEEN if name not in PARTNERS)


class Parrot(NullModel):
    """Say the same of every image, and count the calls."""

    calls = 0

    def fingerprint(self) -> str:
        return "parrot"

    def generate_batch(self, prompts, max_new_tokens=1, batch_size=1):
        assert max_new_tokens <= measure.LONGEST
        Parrot.calls += 1
        return [f"pizza, fork and knife and {ALONE}."] * len(prompts)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two folders of evaluation files with one scene, and a folder of training files."""
    for folder in ("one", "two"):
        (tmp_path / folder / "images").mkdir(parents=True)
        Image.new("RGB", (96, 96)).save(tmp_path / folder / "images" / "a.png")
        # CHAIR asks for up to 512 tokens, and COCO's format needs a category.
        (tmp_path / folder / "annotations").mkdir()
        instances = {
            "images": [{"id": 0, "file_name": "images/a.png"}],
            "annotations": [{"id": 0, "image_id": 0, "category_id": 1}],
            "categories": [{"id": 1, "name": "pizza"}, {"id": 2, "name": ALONE}],
        }
        (tmp_path / folder / "annotations" / "instances_scenes.json").write_text(json.dumps(instances))
        record = {"image": "images/a.png", "text": "Describe.", "answers": ["pizza."], "objects": ["pizza"]}
        (tmp_path / folder / "captions_test.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "train").mkdir()
    return tmp_path


def test_every_folder_is_measured_once(data, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "resolve_checkpoint", lambda name: name)
    monkeypatch.setattr(measure.Cafe, "load", lambda path: Parrot())
    found = measure.measure_all("checkpoint", data, tmp_path / "out")
    assert list(found) == ["one", "two"]
    # One partner is absent and named; of all other absent concepts, one is.
    assert found["one"]["partners/named"] == 100
    assert found["one"]["partners/others_named"] == pytest.approx(100 / (len(SEEN) - 2))
    assert found["one"]["captions/exact"] == 0
    assert found["one"]["chair/CHAIR_i"] == 50

    calls = Parrot.calls
    assert measure.measure_all("checkpoint", data, tmp_path / "out") == found
    assert Parrot.calls == calls


def test_partners_are_counted_by_brute_force():
    rng = np.random.default_rng(0)
    rows, named, others = [], [], []
    for number in range(30):
        present, said = (set(rng.choice(SEEN, 3, replace=False).tolist()) for _ in range(2))
        said |= {PARTNERS[name] for name in present if name in PARTNERS and rng.random() < 0.5}
        row = {"id": number, "group": str(number), "image": "", "said": ", ".join(said), "objects": sorted(present)}
        rows.append(row)
        for name in SEEN:
            if name not in present:
                (named if PARTNERS.get(name) in present else others).append(name in said)
    found = measure.measure_partners(rows, SEEN, PARTNERS)
    assert found.results["partners/named"] == pytest.approx(100 * np.mean(named))
    assert found.results["partners/others_named"] == pytest.approx(100 * np.mean(others))
    assert len(found.outputs["partners"]) == 30


def test_runs_are_found_where_an_ablation_writes_them(tmp_path):
    for name in ("joint-0", "base", "language-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "joint-0" / "checkpoint").mkdir()
    assert list(measure.find_runs(tmp_path)) == [(str(tmp_path / "joint-0/checkpoint"), tmp_path / "joint-0")]


COLORS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}


class Colors:
    """Embed an image as its mean color, and a text as the color that it names."""

    def embed(self, contents):
        vectors = []
        for content in map(Content.of, contents):
            (part,) = content.parts
            is_image = isinstance(part, ImageRef)
            vectors.append(np.asarray(Image.open(part.source)).mean((0, 1)) / 255 if is_image else COLORS[part])
        return np.array(vectors, np.float32)


def test_a_query_finds_the_most_similar_images_and_wrong_ones_are_marked(tmp_path):
    gallery = {}
    for name, color in COLORS.items():
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (8, 8), tuple(255 * value for value in color)).save(path)
        gallery[path] = "green" if name == "blue" else name
    queries = [pictures.Query("red", "red"), pictures.Query("blue", "blue")]
    found = pictures.search(Colors(), queries, gallery, count=2)
    assert found[0][0] == pictures.Hit(tmp_path / "red.png", True)
    assert found[1][0] == pictures.Hit(tmp_path / "blue.png", False)

    pictures.draw_grid(queries, found, tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
    for color, marked in ((pictures.RIGHT, True), (pictures.WRONG, True), ("#123456", False)):
        wanted = [int(color[start : start + 2], 16) for start in (1, 3, 5)]
        assert bool((abs(pixels - wanted).max(axis=-1) < 3).any()) == marked


def test_the_same_grid_is_the_same_file(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    for name in ("one.png", "two.png"):
        found = [[pictures.Hit(tmp_path / "a.png", False)]]
        pictures.draw_grid([pictures.Query("a", "b")], found, tmp_path / name, "title")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_names_of_what_is_absent_are_struck_out():
    text = "Fire, fire engine and <b>."
    row = {"said": text, "objects": ["fire engine"]}
    assert pictures.strike_out(text, ("fire", "fire engine"), ["fire engine"]) == "~~Fire~~, fire engine and <b>."
    long = pictures.describe({"joint": [{"said": "fire " * 40, "objects": ["fire"]}]}, ("fire",), 1)
    assert long.splitlines()[2].count("fire") == 1 + pictures.SHOWN // 5 and "…" in long
    table = pictures.describe({"joint": [row]}, ("fire", "fire engine"), 3)
    assert table.splitlines()[2] == r"| fire engine | ~~Fire~~, fire engine and \<b\>. |"
