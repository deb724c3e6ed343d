"""SugarCrepe, ARO and Winoground: scores against brute force, the real SugarCrepe files, MTEB's own evaluator."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mteb.abstasks.image import AbsTaskImageTextPairClassification
from PIL import Image

from cafe import Cafe
from cafe.content import Content, ImageRef
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.io import json_records
from cafe.evaluation.suite import aggregate
from cafe.evaluation.suites import aro, sugarcrepe, winoground
from cafe.evaluation.suites.choices import METHODS, first_is_best, score
from cafe.images.decoding import decode_image
from cafe.lvlm.prompts import DESCRIBE_PROMPT

SUGARCREPE = Path(__file__).parents[4] / "shared" / "data" / "sugarcrepe"
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Sees:
    """Knows an image's mean color, and how much of it a caption names; says likelier what it sees, plus a prior."""

    def __init__(self, blind: bool = False, prior: float = 0.0) -> None:
        self.blind, self.prior = blind, prior
        self.embedded = 0

    def _vector(self, content: Content) -> np.ndarray:
        if self.blind:
            return np.ones(3)
        if content.images:
            return np.asarray(decode_image(content.images[0]), float).mean(axis=(0, 1)) + 1
        return np.array([name in content.text for name in COLORS], float) + 1e-3

    def embed(self, contents, batch_size=32):
        self.embedded += len(contents)
        rows = np.array([self._vector(Content.of(content)) for content in contents], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def score_batch(self, contents, answers, batch_size=16):
        scores = []
        for content, said in zip(contents, answers, strict=True):
            content = Content.of(content)
            assert content.text == DESCRIBE_PROMPT
            seen = content.images and not self.blind
            fits = [float(self._vector(content) @ self._vector(Content.of(text))) / 255 if seen else 0 for text in said]
            scores.append(np.array([fit - self.prior * len(text) for fit, text in zip(fits, said, strict=True)]))
        return scores


@pytest.fixture
def images(tmp_path):
    for name, color in COLORS.items():
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
    return tmp_path


def test_each_method_scores_as_defined(images):
    model = Sees(prior=0.25)
    shown = [images / "red.png", images / "blue.png", images / "red.png"]
    captions = [["red", "blue thing"], ["blue", "red"], ["green"]]
    scores = score(CachedModel(model), shown, captions)
    assert model.embedded == 2 + 4  # each image and caption once
    for way in METHODS:
        assert [len(found) for found in scores[way]] == [2, 2, 1]
    [image, text] = model.embed([shown[0], "blue thing"])
    assert scores["embedding"][0][1] == pytest.approx(image @ text, abs=1e-6)
    asked = Content.of([shown[0], DESCRIBE_PROMPT])
    assert scores["likelihood"][0][1] == model.score_batch([asked], [["blue thing"]])[0][0]
    assert scores["gain"][0][1] == pytest.approx(scores["likelihood"][0][1] + 0.25 * len("blue thing"))


def test_the_right_caption_must_beat_every_other_and_ties_lose():
    for way in METHODS:
        assert first_is_best(np.array([1.0, 0.5, 0.9]), way) and first_is_best(np.array([1.0]), way)
        assert not first_is_best(np.array([1.0, 0.5, 1.0]), way)
        assert not first_is_best(np.array([np.nan, 0.5]), way) and not first_is_best(np.array([1.0, np.nan]), way)


def write_sugarcrepe(folder: Path, change: str, records: list[dict]) -> None:
    (folder / "sugarcrepe").mkdir(exist_ok=True)
    rows = {str(number): record for number, record in enumerate(records)}
    (folder / "sugarcrepe" / f"{change}.json").write_text(json.dumps(rows))


def test_sugarcrepe_by_every_method_and_its_means(images):
    right = [{"filename": f"{c}.png", "caption": f"{c} thing", "negative_caption": "a mauve thing"} for c in COLORS]
    wrong = [{**row, "caption": row["negative_caption"], "negative_caption": row["caption"]} for row in right]
    write_sugarcrepe(images, "add_att", right)
    write_sugarcrepe(images, "add_obj", wrong[:1])
    write_sugarcrepe(images, "swap_obj", right[:1])
    done = sugarcrepe.run(CachedModel(Sees()), images, None)
    for way in METHODS:
        assert done.results[f"sugarcrepe/add_att/{way}"] == done.results[f"sugarcrepe/swap/{way}"] == 100
        assert done.results[f"sugarcrepe/add/{way}"] == 50 and done.results[f"sugarcrepe/add_obj/{way}"] == 0
        assert done.results[f"sugarcrepe/mean/{way}"] == pytest.approx(200 / 3)
        assert len(done.means[f"sugarcrepe/mean/{way}"]) == 3
    assert aggregate(done.outputs["sugarcrepe/add_att"]).items() <= done.results.items()
    assert set(sugarcrepe.run(CachedModel(Sees(blind=True)), images, None).results.values()) == {0.0}


def test_a_blind_model_that_prefers_short_captions_has_no_gain(images):
    record = {"filename": "red.png", "caption": "a thing", "negative_caption": "a thing and another"}
    write_sugarcrepe(images, "add_obj", [record])
    results = sugarcrepe.run(CachedModel(Sees(blind=True, prior=0.1)), images, None).results
    assert results["sugarcrepe/add_obj/likelihood"] == 100 and results["sugarcrepe/add_obj/gain"] == 0


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        *(("[]", "is empty"), ("{}", "is empty"), ("3", "is empty"), ("no json", "not valid JSON")),
        ('{"0": {"filename": "a"}}', "lacks the field 'caption' in record 1"),
        ('{"0": {"filename": "a", "caption": null}}', "lacks the field 'caption' in record 1"),
        ('["filename"]', "lacks the field 'filename' in record 1"),
    ],
)
def test_a_file_that_is_not_sugarcrepes_is_named(tmp_path, broken, said):
    write_sugarcrepe(tmp_path, "swap_att", [])
    (tmp_path / "sugarcrepe" / "swap_att.json").write_text(broken)
    with pytest.raises(CafeError, match=f"swap_att.json {said}|swap_att.json is {said}"):
        sugarcrepe.run(CachedModel(Sees()), tmp_path, None)


@pytest.mark.skipif(not SUGARCREPE.is_dir(), reason="the real SugarCrepe files are not beside this checkout")
def test_all_seven_real_sugarcrepe_files_are_read():
    counts = {path.stem: len(json_records(path, sugarcrepe.FIELDS)) for path in sugarcrepe.find(SUGARCREPE.parent)}
    assert counts == {
        "add_att": 692, "add_obj": 2062, "replace_att": 788, "replace_obj": 1652, "replace_rel": 1406, "swap_att": 666,
        "swap_obj": 245,
    }  # fmt: skip


def test_a_real_model_scores_captions_in_batches_as_one_by_one(scenes, random_base):
    model = Cafe.load(random_base)
    done = sugarcrepe.run(CachedModel(model), scenes, 2)
    row = next(iter(done.outputs.values()))[0]
    reference = ImageRef(scenes / row["image"])
    image, *texts = (model.embed([one])[0] for one in ([reference], row["caption"], row["negative"]))
    np.testing.assert_allclose(row["scores"]["embedding"], [image @ text for text in texts], atol=1e-5)
    for number, text in enumerate((row["caption"], row["negative"])):
        seen = model.score([reference, DESCRIBE_PROMPT], text)
        assert row["scores"]["likelihood"][number] == pytest.approx(seen, abs=1e-3)
        assert row["scores"]["gain"][number] == pytest.approx(seen - model.score(DESCRIBE_PROMPT, text), abs=2e-3)


def test_winoground_and_aro_on_the_scenes_with_a_real_model(scenes, random_base):
    model = CachedModel(Cafe.load(random_base))
    done = winoground.run(model, scenes, 3)
    assert len(done.outputs["winoground"]) == 3 and done.results.keys() == {
        f"winoground/{way}/{name}" for way in METHODS for name in ("text", "image", "group")
    }
    done = aro.run(model, scenes, 3)
    assert [len(done.outputs[f"aro/{part}"]) for part in ("relation", "attribution")] == [3, 3]
    # Three records are too few for a mean over pairs of attributes, which wants 25 of a kind.
    assert "aro/relation/macro_gain" in done.results and "aro/attribution/macro_gain" not in done.results


def test_winogrounds_scores_agree_with_all_orders_of_four_similarities():
    for a, b, c, d in itertools.product(range(3), repeat=4):  # captions 0 and 1 on image 0, then on image 1
        text, image = winoground.judge(np.array([a, b]), np.array([c, d]))
        by_image = [max((0, 1), key=lambda n, row=row: row[n]) for row in ((a, b), (c, d))]
        assert text == (by_image == [0, 1] and a != b and c != d)
        by_caption = [max((0, 1), key=lambda n, column=column: column[n]) for column in ((a, c), (b, d))]
        assert image == (by_caption == [0, 1] and a != c and b != d)


@pytest.mark.parametrize("seed", range(3))
def test_winogrounds_scores_agree_with_mtebs_own(seed):
    scores = np.random.default_rng(seed).normal(size=(40, 2, 2))  # image by caption
    marks = np.array([winoground.judge(*example) for example in scores])
    theirs = AbsTaskImageTextPairClassification._compute_metrics(None, list(torch.tensor(scores)), 2, 2)
    assert theirs["text_acc"] == pytest.approx(marks[:, 0].mean())
    assert theirs["image_acc"] == pytest.approx(marks[:, 1].mean())
    assert theirs["accuracy"] == pytest.approx(marks.all(axis=1).mean())


def test_winoground_as_json_lines_and_as_parquet(images):
    examples = [
        {"id": number, "caption_0": f"{a} thing", "caption_1": f"{b} thing", "image_0": a, "image_1": b}
        for number, (a, b) in enumerate(itertools.permutations(COLORS, 2))
    ]
    examples[0]["image_1"] = examples[0]["image_0"]  # neither image nor caption can tell these apart
    (images / "winoground" / "images").mkdir(parents=True)
    for name in COLORS:
        (images / f"{name}.png").rename(images / "winoground" / "images" / f"{name}.png")
    lines = images / "winoground" / "examples.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in examples))
    results = winoground.run(CachedModel(Sees()), images, None).results
    assert set(results) == {f"winoground/{way}/{name}" for way in METHODS for name in ("text", "image", "group")}
    assert all(value == pytest.approx(500 / 6) for value in results.values())
    assert set(winoground.run(CachedModel(Sees(blind=True)), images, None).results.values()) == {0.0}

    encoded = [
        {**row, **{side: {"bytes": None, "path": f"{row[side]}.png"} for side in ("image_0", "image_1")}}
        for row in examples
    ]
    file = images / "winoground" / "images" / f"{examples[1]['image_0']}.png"
    encoded[1]["image_0"] = {"bytes": file.read_bytes(), "path": "x.png"}
    lines.unlink()
    pq.write_table(pa.Table.from_pylist(encoded), images / "winoground" / "test.parquet")
    assert winoground.run(CachedModel(Sees()), images, None).results == results
    pq.write_table(pa.Table.from_pylist([{"caption_0": "a"}]), images / "winoground" / "test.parquet")
    with pytest.raises(CafeError, match="caption_1"):
        winoground.read(images / "winoground" / "test.parquet")
    (images / "winoground" / "test.parquet").write_bytes(b"no table")
    with pytest.raises(CafeError, match=r"test.parquet is not valid parquet"):
        winoground.read(images / "winoground" / "test.parquet")


def aro_records() -> list[dict]:
    """Boxes of an image that is red on the left and blue on the right."""
    box = {"image_path": "both.png", "bbox_y": 0, "bbox_w": 8, "bbox_h": 8}
    left, right = {**box, "bbox_x": 0}, {**box, "bbox_x": 8}
    return [
        {**left, "true_caption": "red", "false_caption": "blue", "relation_name": "on"},
        {**right, "true_caption": "blue", "false_caption": "red", "relation_name": "on"},
        {**right, "true_caption": "red", "false_caption": "blue", "relation_name": "in"},  # not what is there
    ]


def test_aro_crops_the_image_to_the_box_and_averages_over_kinds(tmp_path):
    (tmp_path / "aro" / "images").mkdir(parents=True)
    both = Image.new("RGB", (16, 8), "red")
    both.paste("blue", (8, 0, 16, 8))
    both.save(tmp_path / "aro" / "images" / "both.png")
    records = aro_records()
    (tmp_path / "aro" / "visual_genome_relation.json").write_text(json.dumps(records))
    attributes = [{**records[0], "attributes": ["red", "old"]}] * 25 + [{**records[2], "attributes": ["b", "c"]}]
    attributes = [{name: row[name] for name in row if name != "relation_name"} for row in attributes]
    (tmp_path / "aro" / "visual_genome_attribution.json").write_text(json.dumps(attributes))
    results = aro.run(CachedModel(Sees()), tmp_path, None).results
    for way in METHODS:
        assert results[f"aro/relation/{way}"] == pytest.approx(200 / 3)
        assert results[f"aro/relation/macro_{way}"] == 50
        assert results[f"aro/attribution/{way}"] == pytest.approx(2500 / 26)
        assert results[f"aro/attribution/macro_{way}"] == 100  # the other pair comes too seldom
    assert set(aro.run(CachedModel(Sees(blind=True)), tmp_path, None).results.values()) == {0.0}
    (tmp_path / "aro" / "visual_genome_relation.json").write_text(json.dumps([{"image_path": "both.png"}]))
    with pytest.raises(CafeError, match="true_caption"):
        aro.run(CachedModel(Sees()), tmp_path, None)
    for change, said in (({"bbox_w": 0}, "box of record 2 .* holds nothing"), ({"bbox_x": "8"}, "should be a number")):
        (tmp_path / "aro" / "visual_genome_relation.json").write_text(json.dumps([records[0], records[1] | change]))
        with pytest.raises(CafeError, match=said):
            aro.run(CachedModel(Sees()), tmp_path, None)
