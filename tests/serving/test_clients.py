"""Programs that others wrote, against the running server: MTEB's wrappers, and schemathesis on the schema."""

import mteb
import numpy as np
import pytest
import schemathesis
from datasets import Dataset
from http_samples import error_of
from hypothesis import HealthCheck, given, settings
from mteb._create_dataloaders import create_dataloader
from mteb.models.model_implementations.openai_models import OpenAIModel
from mteb.models.openai_wrappers import OpenAIAPIEncodeWrapper, OpenAIAPIRerankWrapper
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

TEXTS = ["a red circle", "two boats", "a blue square", ""]
CHECKS = [
    not_a_server_error,
    allow_header_conformance,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]
OPERATIONS = [
    ("/v1/embeddings", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/rerank", "POST"),
    ("/v1/score", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/health", "GET"),
    ("/ready", "GET"),
    ("/metrics", "GET"),
]


def batches(**columns):
    """The inputs of MTEB's models, and where they are from."""
    name = "Flickr30kI2TRetrieval" if "image" in columns else "STS12"
    metadata = mteb.get_task(name).metadata
    inputs = create_dataloader(Dataset.from_dict(columns), task_metadata=metadata, input_column=tuple(columns))
    return inputs, {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default"}


@pytest.mark.parametrize("use_chat_template", [False, True])
def test_mteb_embeds_texts(url, model_id, served_model, use_chat_template):
    wrapper = OpenAIAPIEncodeWrapper(url, model_id, use_chat_template=use_chat_template)
    inputs, task = batches(text=TEXTS)
    np.testing.assert_allclose(wrapper.encode(inputs, **task), served_model.embed(TEXTS), atol=1e-5)


def test_mteb_embeds_images(url, model_id, served_model):
    images = [Image.new("RGB", (24, 16), color) for color in ("red", "blue")]
    inputs, task = batches(image=images)
    vectors = OpenAIAPIEncodeWrapper(url, model_id, modalities=["image"]).encode(inputs, **task)
    np.testing.assert_allclose(vectors, served_model.embed(images), atol=1e-5)


def test_mteb_reranks(url, model_id, http):
    inputs, task = batches(text=TEXTS[:2])
    others, _ = batches(text=TEXTS[1:3])
    scores = OpenAIAPIRerankWrapper(url, model_id).predict(inputs, others, **task)
    for query, document, score in zip(TEXTS, TEXTS[1:3], scores, strict=False):
        answer = http.post("/v1/rerank", {"query": query, "documents": [document]}).json()
        assert answer["results"][0]["relevance_score"] == pytest.approx(score, abs=1e-5)


def test_mteb_embeds_by_the_openai_client(client, model_id, served_model):
    # Without its constructor, which needs tiktoken to cut long texts.
    model = OpenAIModel.__new__(OpenAIModel)
    model._client, model.model_name, model._embed_dim, model._max_tokens = client, model_id, 16, 100
    model._encoding = type("Encoding", (), {"encode": staticmethod(str.split)})
    inputs, task = batches(text=TEXTS[:3])
    np.testing.assert_allclose(model.encode(inputs, **task), served_model.embed(TEXTS[:3], dim=16), atol=1e-5)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_generated_requests_get_documented_answers(serve, path, method):
    server = serve(max_new_tokens=4, timeout=20)
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")

    @settings(max_examples=15, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy())
    def check(case):
        """Send a request."""
        case.call_and_validate(checks=CHECKS)

    check()
    assert server.embed("a").ok
    assert error_of(server.embed([]))[0] == 400
