"""The floors: on drawings that are easily told apart, and against brute force."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytest.importorskip("skimage")
pytest.importorskip("resvg_py")

from another_hand import floors
from another_hand.measure import seen_names
from another_hand.mentions import mentions, replace
from another_hand.nearest import NearestDrawing, cut, features, on_white
from another_hand.word_regression import WordRegression
from cafe.lvlm.prompts import Prompts

NAMES = ("fire", "fire engine", "fork and knife")
GROUND = (230, 240, 250)


def drawing(kind: int, shift: int = 0) -> np.ndarray:
    """A disc, a square or a cross of one color on a transparent ground."""
    y, x = np.mgrid[:48, :48] - 23.5
    shape = [x**2 + y**2 < 23.5**2, np.maximum(abs(x), abs(y)) < 23, np.minimum(abs(x), abs(y)) < 7][kind]
    color = np.array([[200, 40, 20], [30, 60, 200], [20, 150, 60]][kind]) + shift
    return np.dstack([np.broadcast_to(color, (48, 48, 3)), 255 * shape]).astype(np.uint8)


@pytest.fixture
def nearest() -> NearestDrawing:
    drawings = {name: [drawing(kind), drawing(kind, 20)] for kind, name in enumerate(NAMES)}
    return NearestDrawing.of(drawings, {name: f"group {kind % 2}" for kind, name in enumerate(NAMES)})


def scene(*cells: int | None) -> Image.Image:
    """An image of drawings by another hand, which is darker and smaller."""
    side = 48 if len(cells) == 1 else 96
    image = Image.new("RGB", (side, side), GROUND)
    for number, kind in enumerate(cells):
        if kind is not None:
            layer = Image.fromarray(drawing(kind, -15)).resize((40, 40))
            image.paste(layer, (48 * (number % 2) + 3, 48 * (number // 2) + 5), layer)
    return image


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two scenes and three single drawings, with right and wrong answers in the files."""
    for name, cells in {"a": (0, None, 2, None), "b": (None, 2, 1, None), **{f"s{k}": (k,) for k in range(3)}}.items():
        (tmp_path / "images").mkdir(exist_ok=True)
        scene(*cells).save(tmp_path / "images" / f"{name}.png")
    texts = {"a": "fire and fork and knife.", "b": "fork and knife and fire engine."}
    images = [
        {"filename": f"{name}.png", "filepath": "images", "split": "test", "sentences": [{"raw": text}]}
        for name, text in texts.items()
    ]
    (tmp_path / "dataset_scenes.json").write_text(json.dumps({"images": images}))
    objects = {"a": ["fire", "fork and knife"], "b": ["fork and knife", "fire"]}
    write_lines(
        tmp_path / "captions_test.jsonl",
        [{"image": f"images/{name}.png", "objects": each, "answers": [texts[name]]} for name, each in objects.items()],
    )
    questions = [("s0", "What?", "fire", "name"), ("s1", "What?", "fire", "name"), ("a", "How many?", "two", "count")]
    questions.append(("s1", "Which: fire engine, fork and knife?", "fire engine", "choice"))
    questions.append(("s2", "Which kind?", "group 0", "group"))
    keys = ("image", "text", "answer", "category")
    write_lines(
        tmp_path / "vqa_test.jsonl", [dict(zip(keys, (f"images/{q[0]}.png", *q[1:]), strict=True)) for q in questions]
    )
    asked = [("a", "fire", "yes"), ("a", "fire engine", "no"), ("b", "fire engine", "yes"), ("b", "fire", "no")]
    rows = [{"image": f"images/{i}.png", "text": f"Does it show a {n}?", "label": label} for i, n, label in asked]
    (tmp_path / "pope").mkdir()
    write_lines(tmp_path / "pope" / "x_random.json", rows)
    (tmp_path / "mmeb_eval").mkdir()
    wordings = [name + Prompts().text_instruction for name in NAMES]
    to_text = [record("", f"images/s{k}.png", [wordings[k], *wordings[:k]], [""] * (k + 1)) for k in range(3)]
    to_image = [record(wordings[k], "", [""] * 2, [f"images/s{k}.png", f"images/s{(k + 1) % 3}.png"]) for k in range(3)]
    pq.write_table(pa.Table.from_pylist(to_text), tmp_path / "mmeb_eval" / "name-image-to-text.parquet")
    pq.write_table(pa.Table.from_pylist(to_image), tmp_path / "mmeb_eval" / "name-text-to-image.parquet")
    return tmp_path


def record(text: str, image: str, texts: list[str], images: list[str]) -> dict:
    return {"qry_text": text, "qry_img_path": image, "tgt_text": texts, "tgt_img_path": images}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_name_within_a_longer_one_is_not_mentioned():
    assert mentions("A Fire engine, fork and knife and a firefly; fire.", NAMES) == [
        "fire engine",
        "fork and knife",
        "fire",
    ]
    assert replace("fire and fire engine", NAMES, str.upper) == "FIRE and FIRE ENGINE"
    assert mentions("fire", []) == []


def test_the_product_of_two_features_is_the_cosine_of_edges_and_half_that_of_colors():
    picture = on_white(drawing(0))
    np.testing.assert_allclose(features(picture) @ features(picture), 1.5)
    blank = features(np.full((48, 48, 3), 255, np.uint8))
    assert np.isfinite(blank).all()


def test_a_scene_is_cut_into_its_drawings_in_reading_order():
    pictures = cut(np.asarray(scene(None, 1, 0, None)))
    assert [picture.shape for picture in pictures] == [(48, 48, 3)] * 2
    # Enlarged to the cell: the square and the disc touch its border, and the ground is white.
    assert (pictures[0][24, [1, 46]] < 250).any(axis=-1).all()
    assert (pictures[1][0, 0] == 255).all()
    assert pictures[0][24, 24, 2] > pictures[0][24, 24, 0]


def test_similarity_to_a_concept_is_that_to_its_nearest_drawing(nearest):
    pictures = [on_white(drawing(kind, -15)) for kind in (2, 0)]
    expected = [
        [max(float(features(p) @ features(on_white(drawing(k, s)))) for s in (0, 20)) for k in range(3)]
        for p in pictures
    ]
    np.testing.assert_allclose(nearest.compare(pictures), expected)


def test_the_floors_of_a_folder(nearest, data):
    found = floors.measure_floors(nearest, data)
    floor, chance = found["floor"], found["chance"]
    # One of two names is wrong on purpose; so is one object of four.
    assert (floor["vqa/name"], floor["vqa/choice"], floor["vqa/group"], floor["vqa/count"]) == (50, 100, 100, 100)
    assert (floor["objects/hallucinated"], floor["objects/recall"], floor["chair/CHAIR_i"]) == (25, 75, 25)
    assert floor["captions/exact"] == 100
    # Fork and knife go with pizza, which is never named; a fire engine is named and absent in one scene of two.
    others = 2 * (len(seen_names()) - 3)
    assert (floor["partners/named"], floor["partners/others_named"]) == (0, pytest.approx(100 / others))
    assert floor["throne/overall/F1"] == pytest.approx(75)
    assert floor["pope/random/auc"] == floor["pope/mean/auc"] == 100
    assert floor["retrieval/image_to_text/R@1"] == floor["retrieval/text_to_image/R@1"] == 100
    assert floor["mmeb/name-image-to-text/P@1"] == floor["mmeb/name-text-to-image/P@1"] == 100
    assert chance["vqa/name"] == pytest.approx(100 / 3)
    assert (chance["vqa/choice"], chance["vqa/group"], chance["retrieval/image_to_text/R@1"]) == (50, 50, 50)
    assert chance["mmeb/name-image-to-text/P@1"] == pytest.approx(100 * (1 + 1 / 2 + 1 / 3) / 3)


def test_a_caption_fits_cells_in_its_order_and_no_other_number_of_them():
    similarities = np.array([[0.5, 0.1], [0.2, 0.9]])
    assert floors.fit(similarities) == pytest.approx(0.7)
    assert floors.fit(similarities[:1]) == -np.inf


def test_unseen_drawings_find_words_that_they_share_with_seen_ones(data):
    seen = {"ball": [drawing(0), drawing(0, 20)], "box": [drawing(1), drawing(1, 20)]}
    words = {"ball": "ball round red", "box": "box angular blue", "fire": "fire red", "fire engine": "blue thing"}
    regression = WordRegression(seen, words)
    questions = [{"image": f"images/s{k}.png", "text": "", "answer": NAMES[k], "category": "name"} for k in range(2)]
    write_lines(data / "vqa_test.jsonl", questions)
    found = floors.unseen_floors(regression, data, {name: words[name] for name in NAMES[:2]})
    assert found["floor"]["unseen/image_to_words/R@1"] == 100
    assert found["chance"]["unseen/image_to_words/R@1"] == 50


def test_word_regression_is_ridge_regression_in_its_closed_form():
    drawings = {"a": [drawing(0)], "b": [drawing(1)], "c": [drawing(2)]}
    words = {"a": "round red", "b": "red", "c": "green"}
    regression = WordRegression(drawings, words)
    rows = np.stack([features(on_white(each[0])) for each in drawings.values()])
    bags = np.array([[0.0, 1, 1], [0, 1, 0], [1, 0, 0]])  # green, red, round
    rarity = np.log(4 / np.array([2, 3, 2])) + 1  # smoothed, as scikit-learn has it
    bags = bags * rarity / np.linalg.norm(bags * rarity, axis=1, keepdims=True)
    center, mean = rows.mean(axis=0), bags.mean(axis=0)
    gram = (rows - center) @ (rows - center).T + regression.ridge.alpha_ * np.eye(3)
    query = features(on_white(drawing(0, 20)))
    predicted = mean + (query - center) @ (rows - center).T @ np.linalg.solve(gram, bags - mean)
    expected = bags @ predicted / np.linalg.norm(predicted)
    np.testing.assert_allclose(
        regression.score([on_white(drawing(0, 20))], list(words.values()))[0], expected, rtol=1e-6
    )
