"""CHAIR by hand and by counting again; on COCO's files and on the scenes' own classes."""

import json
from random import Random

import pytest
from PIL import Image

from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import aggregate
from cafe.evaluation.suites import chair, throne
from cafe.evaluation.suites.coco import SYNONYMS


class Says:
    """Says of each image what it is given, and remembers what it was asked."""

    def __init__(self, said: dict[str, str]) -> None:
        self.said = said
        self.asked: list[str] = []

    def generate_batch(self, prompts, max_new_tokens=512, batch_size=64):
        self.asked += [prompt.text for prompt in prompts]
        return [self.said[str(prompt.images[0]).rsplit("/", 1)[-1]] for prompt in prompts]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2014").mkdir()
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / "val2014" / f"{name}.jpg")
    parsed = {
        "info": {"year": 2014},
        "images": [{"id": number, "file_name": f"{name}.jpg"} for number, name in enumerate("abc")],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "person"}],
        "annotations": [{"image_id": 0, "category_id": 1}, {"image_id": 1, "category_id": 3}],
    }
    (tmp_path / "annotations" / "instances_val2014.json").write_text(json.dumps(parsed))
    return tmp_path


SAID = {"a.jpg": "A dog, a puppy and a cat.", "b.jpg": "A man with a dog and another dog.", "c.jpg": ""}


def test_every_mention_counts_and_a_description_counts_once(data):
    model = Says(SAID)
    done = chair.run(CachedModel(model), data, None)
    assert done.results == pytest.approx(
        {"chair/CHAIR_i": 50, "chair/CHAIR_s": 200 / 3, "chair/recall": 100, "chair/mentions": 2}
    )
    assert done.outputs["chair"][0]["mentioned"] == ["dog", "dog", "cat"]
    assert set(model.asked) == {chair.PROMPT}


def test_objects_in_peoples_captions_count_as_present(data):
    captions = {"annotations": [{"image_id": 1, "caption": "A man and his puppy."}]}
    (data / "annotations" / "captions_val2014.json").write_text(json.dumps(captions))
    results = chair.run(CachedModel(Says(SAID)), data, None).results
    assert results["chair/CHAIR_i"] == pytest.approx(100 / 6) and results["chair/CHAIR_s"] == pytest.approx(100 / 3)


def test_an_empty_description_hallucinates_nothing_and_has_recall_0(data):
    results = chair.run(CachedModel(Says(dict.fromkeys(SAID, ""))), data, None).results
    assert results == {"chair/CHAIR_i": 0, "chair/CHAIR_s": 0, "chair/recall": 0, "chair/mentions": 0}


def test_the_counts_over_many_descriptions_agree_with_counting_again():
    rng = Random(0)
    names = ["a", "b", "c", "d"]
    described = [
        (rng.choices(names, k=rng.randrange(5)), set(rng.sample(names, rng.randrange(1, 4)))) for _ in range(200)
    ]
    results = aggregate([{"marks": chair.contributions(mentioned, present)} for mentioned, present in described])
    mentions = [(name, present) for mentioned, present in described for name in mentioned]
    assert results["chair/CHAIR_i"] == pytest.approx(100 * sum(n not in p for n, p in mentions) / len(mentions))
    liars = sum(1 for mentioned, present in described if set(mentioned) - present)
    assert results["chair/CHAIR_s"] == pytest.approx(100 * liars / 200)


def test_a_missing_image_is_named_and_a_file_may_set_its_prompt(data):
    (data / "val2014" / "c.jpg").unlink()
    with pytest.raises(CafeError, match=r"c\.jpg"):
        chair.run(CachedModel(Says(SAID)), data, None)
    path = data / "annotations" / "instances_val2014.json"
    parsed = json.loads(path.read_text())
    path.rename(path.with_name("instances_mine.json"))
    path.with_name("instances_mine.json").write_text(json.dumps({**parsed, "info": {"prompt": "What is there?"}}))
    model = Says(SAID)
    chair.run(CachedModel(model), data, 2)
    assert model.asked == ["What is there?"] * 2


def test_on_the_scenes_a_model_that_sees_everything_invents_nothing(scenes):
    rows = [json.loads(line) for line in (scenes / "captions_test.jsonl").read_text().splitlines()]
    knows = Says({row["image"].rsplit("/", 1)[-1]: row["answers"][0] for row in rows})
    done = chair.run(CachedModel(knows), scenes, None)
    assert done.results["chair/CHAIR_i"] == done.results["chair/CHAIR_s"] == 0 and done.results["chair/recall"] == 100
    assert set(knows.asked) == {row["text"] for row in rows}  # the file says what to ask
    stated = throne.run(CachedModel(knows), scenes, None).results
    assert stated["throne/class/F0.5"] == stated["throne/overall/F1"] == 100
    others = Says({name: "A ring and a star." for name in knows.said})
    done = chair.run(CachedModel(others), scenes, None)
    wrong = sum(kind not in row["objects"] for row in rows for kind in ("ring", "star"))
    assert done.results["chair/CHAIR_i"] == pytest.approx(100 * wrong / (2 * len(rows)))


def test_five_true_sentences_have_no_hallucination(tmp_path):
    shown = {
        "A baseball player stands at home plate.": ["person"],
        "A red motor bike.": ["motorcycle"],
        "Policemen on horses.": ["person", "horse"],
        "Grandchildren eat cupcakes with knives.": ["person", "cake", "knife"],
        "A football fan's man-made pond by the train tracks, where a baby elephant drinks.": ["elephant"],
    }
    (tmp_path / "annotations").mkdir()
    classes = [line.split(",")[0] for line in SYNONYMS.splitlines()]
    parsed = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(len(shown))],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes)],
        "annotations": [
            {"image_id": number, "category_id": classes.index(name)}
            for number, names in enumerate(shown.values())
            for name in names
        ],
    }
    for number in range(len(shown)):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "annotations" / "instances_val2014.json").write_text(json.dumps(parsed))
    said = {f"{number}.png": text for number, text in enumerate(shown)}
    results = chair.run(CachedModel(Says(said)), tmp_path, None).results
    assert results["chair/CHAIR_i"] == results["chair/CHAIR_s"] == 0
    assert results["chair/recall"] == 100
