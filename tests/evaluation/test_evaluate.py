"""Evaluation of a model that sees everything, one that sees nothing, and a real one."""

import json
from pathlib import Path

import numpy as np
import pytest

from cafe import Cafe
from cafe.content import Content
from cafe.errors import CafeError
from cafe.evaluation.evaluate import evaluate, write
from cafe.instructions import Prompts


class Oracle:
    """Answers from the annotation files themselves."""

    def __init__(self, data: Path) -> None:
        self.owner = {}
        for index, row in enumerate(json.loads((data / "dataset_scenes.json").read_text())["images"]):
            for key in (row["filename"], *(sentence["raw"] for sentence in row["sentences"])):
                self.owner[key] = index
        self.said = {}
        for file in [data / "captions_test.jsonl", data / "vqa_test.jsonl", *(data / "pope").glob("*.json")]:
            for line in file.read_text().splitlines():
                row = json.loads(line)
                answer = row.get("answer") or row.get("label") or row["answers"][0]
                self.said[Path(row["image"]).name, row["text"]] = answer

    def embed(self, contents, batch_size=32):
        keys = [content if isinstance(content, str) else content.name for content in contents]
        return np.eye(len(self.owner), dtype=np.float32)[[self.owner[key] for key in keys]]

    def generate_batch(self, prompts: list[Content], max_new_tokens=64, batch_size=64):
        return [self.said[prompt.images[0].source.name, prompt.text] for prompt in prompts]


class Collapsed:
    """The same vector and the same word for everything."""

    def embed(self, contents, batch_size=32):
        return np.ones((len(contents), 1), np.float32)

    def generate_batch(self, prompts, max_new_tokens=64, batch_size=64):
        return ["Yes"] * len(prompts)


def test_a_model_that_sees_everything_scores_everything(scenes):
    results = evaluate(Oracle(scenes), scenes, report=lambda line: None).results
    for name in ("retrieval/image_to_text/R@1", "retrieval/text_to_image/R@1", "captions/exact", "objects/recall"):
        assert results[name] == 100
    assert results["vqa/all"] == results["pope/adversarial/accuracy"] == results["pope/random/F1"] == 100
    assert results["objects/hallucinated"] == 0 and results["geometry/modality_gap"] == pytest.approx(0, abs=1e-6)


def test_a_collapsed_model_scores_nothing(scenes):
    results = evaluate(Collapsed(), scenes, report=lambda line: None).results
    assert results["retrieval/image_to_text/R@10"] == results["retrieval/text_to_image/R@10"] == 0
    assert results["pope/popular/accuracy"] == 50 and results["pope/popular/yes_ratio"] == 100
    assert results["captions/exact"] == 0


def test_a_real_model_is_measured_and_written(random_base, scenes, tmp_path):
    model = Cafe.load(random_base, Prompts())
    evaluation = evaluate(model, scenes, limit=4, report=lambda line: None)
    write(evaluation, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == evaluation.results and all(isinstance(value, float) for value in results.values())
    assert np.load(tmp_path / "embeddings.npz")["images"].shape == (4, 160)


def test_a_folder_without_evaluation_files_is_one_sentence(tmp_path):
    with pytest.raises(CafeError, match="no evaluation file"):
        evaluate(Collapsed(), tmp_path)
