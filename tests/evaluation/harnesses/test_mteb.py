"""The encoder in the real MTEB, on tiny local tasks: it runs, and MTEB's numbers are ours."""

import json

import mteb
import numpy as np
import pytest
from datasets import Dataset
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.mocks.mock_tasks import MockAny2AnyRetrievalT2ITask, MockImageTextPairClassificationTask
from PIL import Image

from cafe import Cafe
from cafe.errors import CafeError
from cafe.evaluation.harnesses.mteb import CafeEncoder, contents
from cafe.evaluation.metrics import ranks

COUNT = 6


@pytest.fixture(scope="module")
def encoder(random_base):
    return CafeEncoder(str(random_base), device="cpu")


@pytest.fixture(scope="module")
def pairs(scenes):
    rows = [row for row in json.loads((scenes / "dataset_scenes.json").read_text())["images"] if row["split"] == "test"]
    images = [Image.open(scenes / row["filepath"] / row["filename"]).convert("RGB") for row in rows[:COUNT]]
    return images, [row["sentences"][0]["raw"] for row in rows[:COUNT]]


class SceneRetrieval(MockAny2AnyRetrievalT2ITask):
    """Captions look for their images."""

    def load_data(self, num_proc=None, **kwargs) -> None:
        images, captions = self.pairs
        names = [f"d{number}" for number in range(COUNT)]
        data = RetrievalSplitData(
            queries=Dataset.from_dict({"id": [f"q{number}" for number in range(COUNT)], "text": captions}),
            corpus=Dataset.from_dict({"id": names, "image": images}),
            relevant_docs={f"q{number}": {name: 1} for number, name in enumerate(names)},
            top_ranked=None,
        )
        self.dataset = {"default": {"test": data}}
        self.data_loaded = True


def scores_of(encoder, task) -> dict:
    [result] = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False).task_results
    return result.scores["test"][0]


def test_mtebs_retrieval_numbers_are_ours(encoder, pairs):
    task = SceneRetrieval()
    task.pairs = pairs
    scores = scores_of(encoder, task)
    images, captions = pairs
    rank = ranks(encoder.model.embed(captions), encoder.model.embed(images), np.arange(COUNT), np.arange(COUNT))
    for k in (1, 3, 5):
        assert scores[f"recall_at_{k}"] == pytest.approx((rank < k).mean(), abs=1e-5)
    assert scores["mrr_at_10"] == pytest.approx((1 / (rank + 1)).mean(), abs=1e-5)


def test_a_compositionality_task_runs_and_the_model_is_described(encoder, random_base):
    scores = scores_of(encoder, MockImageTextPairClassificationTask())
    assert 0 <= scores["text_acc"] <= 1
    assert encoder.mteb_model_meta.name == f"cafe/{random_base.name}"
    assert encoder.mteb_model_meta.embed_dim == 160 and encoder.mteb_model_meta.modalities == ["image", "text"]


def test_images_and_texts_of_a_batch_are_embedded_together(encoder, pairs):
    images, captions = pairs
    batch = {"text": captions[:3], "image": images[:3], "id": ["a", "b", "c"]}
    found = encoder.encode([batch, batch], task_metadata=None, hf_split="", hf_subset="", batch_size=1)
    together = [{"image": image, "text": text} for image, text in zip(images, captions, strict=True)]
    np.testing.assert_allclose(found, np.tile(encoder.model.embed(together[:3]), (2, 1)), atol=1e-5)


def test_audio_is_refused_with_a_clear_message():
    with pytest.raises(CafeError, match="not audio"):
        contents({"audio": [1], "text": ["a"]})
    with pytest.raises(CafeError, match="texts and images"):
        contents({"label": [1]})


def test_a_loaded_model_is_taken_as_it_is(random_base):
    model = Cafe.load(random_base)
    assert CafeEncoder(model).model is model
