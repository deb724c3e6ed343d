"""Embeddings by HTTP, asked for by the real client and in the shapes of other servers."""

import base64

import numpy as np
import pytest
from http_samples import BLUE, RED, data_uri, error_of, image_part, user

TEXTS = ["a red circle", "two boats in front of a house", ""]


def vectors_of(answer):
    """The vectors of an answer, in order."""
    assert [each["index"] for each in answer["data"]] == list(range(len(answer["data"])))
    return np.array([each["embedding"] for each in answer["data"]])


@pytest.mark.parametrize("encoding_format", ["float", "base64", None])
def test_texts_have_the_vectors_of_the_library(client, model_id, served_model, encoding_format):
    options = {"encoding_format": encoding_format} if encoding_format else {}
    answer = client.embeddings.create(model=model_id, input=TEXTS, **options)
    vectors = [each.embedding for each in answer.data]
    if encoding_format == "base64":  # the client decodes only what it asked for by itself
        vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
    np.testing.assert_allclose(np.array(vectors), served_model.embed(TEXTS), atol=1e-5)
    assert answer.model == model_id
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 3


def test_jinas_names_of_parameters(http, served_model):
    answer = http.embed("a red circle", embedding_type="base64", normalized=True).json()
    vector = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, served_model.embed(["a red circle"])[0], atol=1e-5)
    assert error_of(http.embed("a", normalized=False)) == (422, "invalid_value")


def test_a_single_text(http, served_model):
    answer = http.embed("a red circle").json()
    np.testing.assert_allclose(vectors_of(answer), served_model.embed(["a red circle"]), atol=1e-5)


@pytest.mark.parametrize(
    "item",
    [
        {"image": data_uri(RED)},
        {"image": base64.b64encode(RED).decode()},
        {"image": base64.encodebytes(RED).decode()},
        {"content": [image_part(RED)]},
    ],
    ids=["data uri", "base64", "lines of base64", "parts"],
)
def test_images_in_all_shapes(client, model_id, served_model, item):
    answer = client.embeddings.create(model=model_id, input=[item, "words"])  # the client passes items on
    np.testing.assert_allclose(
        np.array([each.embedding for each in answer.data]), served_model.embed([{"image": RED}, "words"]), atol=1e-5
    )


def test_an_image_and_a_text_in_one_item(http, served_model):
    answer = http.embed([{"text": "at night", "image": data_uri(RED)}]).json()
    np.testing.assert_allclose(vectors_of(answer), served_model.embed([{"image": RED, "text": "at night"}]), atol=1e-5)


def test_one_conversation_and_a_list_of_them(http, served_model):
    expected = served_model.embed([[RED, "what is this?"], ["before", BLUE]])
    conversations = [[user(RED, "what is this?")], [user("before", BLUE), {"role": "assistant", "content": ""}]]
    answer = http.post("/v1/embeddings", {"messages": conversations}).json()
    np.testing.assert_allclose(vectors_of(answer), expected, atol=1e-5)
    answer = http.post("/v1/embeddings", {"messages": conversations[0]}).json()
    np.testing.assert_allclose(vectors_of(answer), expected[:1], atol=1e-5)


def test_fewer_dimensions_are_the_first_ones_with_length_one(http, served_model):
    answer = http.embed(TEXTS, dimensions=8).json()
    np.testing.assert_allclose(vectors_of(answer), served_model.embed(TEXTS, dim=8), atol=1e-5)
    width = served_model.embed(["a"]).shape[1]
    assert http.embed(TEXTS, dimensions=width).ok
    assert error_of(http.embed(TEXTS, dimensions=width + 1)) == (400, "invalid_value")
    assert error_of(http.embed(TEXTS, dimensions=0)) == (422, "invalid_value")


def test_a_bad_image_fails_its_request_and_is_named(http):
    items = ["words", {"image": data_uri(RED)}, {"image": data_uri(b"no image")}]
    response = http.embed(items)
    assert error_of(response) == (400, "image_decode_failed")
    error = response.json()["error"]
    assert error["param"] == "input.2" and "image 2" in error["message"]
    assert http.embed(items[:2]).ok


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "invalid_value"),
        ({"input": "a", "messages": [user("a")]}, 400, "invalid_value"),
        ({"input": []}, 400, "invalid_value"),
        ({"input": ["a"] * 257}, 400, "invalid_value"),
        ({"input": [1, 2]}, 400, "unsupported_value"),
        ({"input": [[1, 2], [3]]}, 400, "unsupported_value"),
        ({"input": [{}]}, 400, "invalid_value"),
        ({"input": [{"text": "a", "content": []}]}, 400, "invalid_value"),
        ({"input": [{"text": "a", "video": "b"}]}, 400, "unknown_field"),
        ({"input": 3}, 422, "invalid_value"),
        ({"input": "a", "encoding_format": "int8"}, 422, "invalid_value"),
        ({"messages": [{"role": "system", "content": "be short"}, user("a")]}, 400, "unsupported_value"),
        ({"input": "a", "model": "another"}, 404, "model_not_found"),
        ({"input": "word " * 9000}, 400, "context_length_exceeded"),
        ({"input": "x" * 300_000}, 400, "context_length_exceeded"),
    ],
)
def test_what_cannot_be_embedded(http, body, status, code):
    assert error_of(http.post("/v1/embeddings", body)) == (status, code)


def test_an_unknown_field_is_named(http):
    error = http.embed("a", truncate=True).json()["error"]
    assert (error["param"], error["message"]) == ("truncate", "There is no field truncate.")
    error = http.embed(["a", {"text": "a", "video": "b"}]).json()["error"]
    assert error["param"] == "input.1.video"
