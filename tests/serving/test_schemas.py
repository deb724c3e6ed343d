"""What requests may hold, and how much of an error is made of one that holds the wrong things."""

import pytest
from http_samples import error_of, text_part
from pydantic import ValidationError

from cafe.serving.schemas import MAX_FIELDS, ChatRequest, EmbeddingsRequest, RerankRequest
from cafe.serving.search_schemas import AskRequest

MANY = 10_000


@pytest.mark.parametrize(
    ("schema", "fields"),
    [
        (EmbeddingsRequest, {"input": [1.5] * MANY}),
        (EmbeddingsRequest, {"input": [{"other": 1}] * MANY}),
        (EmbeddingsRequest, {"input": [[1.5] * MANY] * 10}),
        (EmbeddingsRequest, {"messages": [[{"role": "user", "content": [{"other": 1}] * 100}]] * 100}),
        (ChatRequest, {"messages": [{"other": 1}] * MANY}),
        (ChatRequest, {"messages": [], **{f"field_{number}": 1 for number in range(MANY)}}),
        (ChatRequest, {"messages": [{f"field_{number}": 1 for number in range(MANY)}]}),
        (RerankRequest, {"query": "a", "documents": [1] * MANY}),
        (AskRequest, {"question": "a", "ids": [1] * MANY, "history": [1] * MANY, "where": [1] * MANY}),
    ],
)
def test_many_faults_are_a_few_errors(schema, fields):
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(fields)
    assert caught.value.error_count() < 20


def test_a_few_unknown_fields_are_each_named(http):
    body = {"input": "a", **{f"field_{number}": 1 for number in range(MAX_FIELDS)}}
    assert error_of(http.post("/v1/embeddings", body)) == (422, "invalid_value")
    response = http.embed("a", inputs="b")
    assert error_of(response) == (400, "unknown_field") and response.json()["error"]["param"] == "inputs"


def test_turns_and_parts_without_words_are_limited(http, services):
    most = services.config.limits.max_input_tokens
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}] * (most // 2 + 1)
    parts = [{"role": "user", "content": [text_part("")] * (most + 1)}]
    for messages in (turns, parts):
        for body, path in (({"messages": messages}, "embeddings"), ({"messages": messages}, "chat/completions")):
            assert error_of(http.post(f"/v1/{path}", body)) == (400, "context_length_exceeded")
    item = {"content": [text_part("")] * (most + 1)}
    assert error_of(http.post("/v1/rerank", {"query": "a", "documents": [item]})) == (400, "context_length_exceeded")
