"""CIDEr through pycocoevalcap: as a caption is more like those of people, it is more; against the formula by hand."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suites import cider


def by_formula(captions: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D written down from the paper: clipped TF-IDF vectors of 1 to 4 words, a penalty for length, times 10."""

    def grams(text: str) -> list[Counter]:
        words = cider.words(text).split()
        return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, 5)]

    documents = [Counter() for _ in range(4)]
    for texts in references:
        for n in range(4):
            documents[n].update({gram for text in texts for gram in grams(text)[n]})

    def vector(counts: Counter, n: int) -> dict:
        return {g: c * (np.log(len(references)) - np.log(max(1, documents[n][g]))) for g, c in counts.items()}

    def norm(values: dict) -> float:
        return float(np.sqrt(sum(value**2 for value in values.values())))

    scores = []
    for caption, texts in zip(captions, references, strict=True):
        total = 0.0
        for text in texts:
            said, wanted = grams(caption), grams(text)
            delta = sum(said[1].values()) - sum(wanted[1].values())  # the package counts length in pairs of words
            for n in range(4):
                a, b = vector(said[n], n), vector(wanted[n], n)
                dot = sum(min(a[g], b[g]) * b[g] for g in a if g in b)
                alike = dot / (norm(a) * norm(b)) if norm(a) and norm(b) else 0.0
                total += alike * np.exp(-(delta**2) / 72) / 4
        scores.append(10 * total / len(texts))
    return scores


def test_cider_agrees_with_the_formula():
    references = [
        ["A red circle, left of a blue star.", "There is a red circle and a blue star."],
        ["Two large green rings.", "green rings: two"],
        ["A heart."],
    ]
    captions = ["a red circle left of a green star", "two large green rings", ""]
    found = cider.cider(captions, references)
    np.testing.assert_allclose(found, by_formula(captions, references), atol=1e-6)
    assert found[1] > found[0] > found[2] == 0


def test_the_suite_asks_for_a_caption_of_each_test_image(tmp_path):
    (tmp_path / "cider").mkdir()
    (tmp_path / "images").mkdir()
    said = {"a.png": "a red circle", "b.png": "two blue stars"}
    for name in said:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    rows = [{"filename": name, "split": "test", "sentences": [{"raw": text}]} for name, text in said.items()]
    (tmp_path / "cider" / "dataset_mine.json").write_text(json.dumps({"images": rows}))

    class Knows:
        def generate_batch(self, prompts, max_new_tokens=64, batch_size=64):
            return [said[str(prompt.images[0]).rsplit("/", 1)[-1]] for prompt in prompts]

    done = cider.run(CachedModel(Knows()), tmp_path, None)
    expected = 100 * np.mean(by_formula(list(said.values()), [[text] for text in said.values()]))
    assert done.results == {"cider/CIDEr": pytest.approx(expected)}
    assert [row["said"] for row in done.outputs["cider"]] == list(said.values())


def test_each_caption_of_an_image_in_a_karpathy_file_is_a_reference(scenes, tmp_path):
    (tmp_path / "cider").mkdir()
    shutil.copy(scenes / "dataset_scenes.json", tmp_path / "cider")
    (tmp_path / "images").symlink_to(scenes / "images")
    rows = json.loads((scenes / "dataset_scenes.json").read_text())["images"]
    said = {row["filename"]: [text["raw"] for text in row["sentences"]] for row in rows if row["split"] == "test"}

    class Knows:
        def generate_batch(self, prompts, max_new_tokens=64, batch_size=64):
            return [said[prompt.images[0].source.name][1] for prompt in prompts]

    done = cider.run(CachedModel(Knows()), tmp_path, None)
    expected = 100 * np.mean(by_formula([texts[1] for texts in said.values()], list(said.values())))
    assert done.results == {"cider/CIDEr": pytest.approx(expected)} and len(done.outputs["cider"]) == len(said)


def test_a_missing_package_names_the_pip_command(monkeypatch):
    monkeypatch.setattr(cider, "find_spec", lambda name: None)
    with pytest.raises(CafeError, match="pip install"):
        cider.cider(["a"], [["a"]])
