"""Chats by HTTP, asked by the real client."""

import json

import pytest
from http_samples import BLUE, RED, RecordingEngine, blocked, connect, error_of, post_head, user

from cafe.content import Content, Dialogue, Turn

QUESTION = "What is in the image?"


def words_of(chunks):
    """The text of a stream."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_an_answer_has_the_words_and_the_usage(client, model_id, served_model):
    answer = client.chat.completions.create(model=model_id, messages=[user(RED, QUESTION)], max_tokens=8, temperature=0)
    assert answer.choices[0].message.content == served_model.generate(RED, QUESTION, max_new_tokens=8)
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].finish_reason in ("stop", "length")
    branch = served_model.encode_prompt(Content.of([RED, QUESTION]))
    usage = answer.usage
    assert usage.prompt_tokens == len(branch) and 0 < usage.completion_tokens <= 8
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.image_tokens == int(branch.image_mask.sum()) > 0
    assert usage.prompt_tokens_details.cached_tokens <= len(branch)


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_begins_with_the_role_and_ends_with_the_reason(client, model_id, served_model, include_usage):
    chunks = list(
        client.chat.completions.create(
            model=model_id,
            messages=[user(RED, QUESTION)],
            max_completion_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": include_usage},
        )
    )
    assert words_of(chunks) == served_model.generate(RED, QUESTION, max_new_tokens=8)
    assert chunks[0].choices[0].delta.role == "assistant"
    *chunks, last = chunks if include_usage else [*chunks, None]
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].model == model_id
    if last:
        assert not last.choices and last.usage.total_tokens > last.usage.prompt_tokens > 0


def test_the_events_of_a_stream_end_with_done(http):
    response = http.chat(user("Hello"), stream=True)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_turns_with_several_images_are_read_in_order(services, serve, served_model):
    engine = RecordingEngine(services.engine)
    server = serve(engine=engine)
    server.chat(user(RED, "and", BLUE), {"role": "assistant", "content": "Two."}, user("What is first?"))
    dialogue = Dialogue(
        (
            Turn("user", Content.of([RED, "and", BLUE])),
            Turn("assistant", Content.of("Two.")),
            Turn("user", Content.of("What is first?")),
        )
    )
    # What the library reads of the dialogue up to the answer, which it takes with a turn of the assistant at the end.
    whole = served_model.encode_dialogue(Dialogue((*dialogue.turns, Turn("assistant", Content.of("x")))))
    branch = engine.jobs[0].branch
    assert branch.input_ids.tolist() == whole.input_ids[: len(branch)].tolist()
    assert (branch.image_inputs["pixel_values"] == whole.image_inputs["pixel_values"]).all()


def test_a_system_turn_takes_the_place_of_the_models_own(services, serve):
    engine = RecordingEngine(services.engine)
    server = serve(engine=engine)
    for role in ("system", "developer"):
        server.chat({"role": role, "content": "Be short."}, user("Hello"))
    server.chat(user("Hello"))
    decode = services.model.chat_processor.tokenizer.decode
    own, other, without = (decode(job.branch.input_ids) for job in engine.jobs)
    assert own == other and "Be short." in own and "helpful" not in own and "helpful" in without


def test_sampling_parameters_reach_the_engine(services, serve):
    engine = RecordingEngine(services.engine)
    server = serve(engine=engine)
    server.chat(user("a"), temperature=0.5, top_p=0.9, seed=7, stop=["x", "y"], max_tokens=3)
    server.chat(user("a"), stop="x", temperature=None, max_tokens=None, max_completion_tokens=2)
    first, second = (job.sampling for job in engine.jobs)
    assert (first.temperature, first.top_p, first.seed, first.stop, first.max_tokens) == (0.5, 0.9, 7, ("x", "y"), 3)
    assert (second.temperature, second.top_p, second.seed, second.stop, second.max_tokens) == (1, 1, None, ("x",), 2)


def test_parameters_that_change_nothing_are_taken(http):
    response = http.chat(
        user("a"),
        user="someone",
        n=1,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        logprobs=False,
        response_format={"type": "text"},
        tools=[],
        tool_choice="auto",
        metadata={"a": "b"},
        stream_options=None,
        parallel_tool_calls=True,
        store=False,
    )
    assert response.ok


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"n": 2}, 400, "unsupported_value"),
        ({"logprobs": True}, 400, "unsupported_value"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_value"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_value"),
        ({"frequency_penalty": 0.5}, 400, "unsupported_value"),
        ({"best_of": 2}, 400, "unknown_field"),
        ({"temperature": 3}, 422, "invalid_value"),
        ({"temperature": "hot"}, 422, "invalid_value"),
        ({"max_tokens": 0}, 422, "invalid_value"),
        ({"max_tokens": 10**6}, 400, "invalid_value"),
        ({"stop": list("abcde")}, 400, "invalid_value"),
        ({"stop": ""}, 400, "invalid_value"),
        ({"stop": "a" * 257}, 400, "invalid_value"),
        ({"model": "another"}, 404, "model_not_found"),
        ({"messages": []}, 422, "invalid_value"),
        ({"messages": None}, 422, "invalid_value"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 422, "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "unsupported_value"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "invalid_value"),
        ({"messages": [user(*[RED] * 9)]}, 400, "too_many_images"),
        ({"messages": [user("word " * 9000)]}, 400, "context_length_exceeded"),
    ],
)
def test_what_cannot_be_answered(http, fields, status, code):
    assert error_of(http.chat(user("a"), **fields)) == (status, code)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_chat(services, serve, stream):
    engine = RecordingEngine(services.engine)
    server = serve(engine=engine)
    body = json.dumps({"messages": [user("Hello")], "stream": stream}).encode()
    with blocked(services.engine), connect(server.url) as connection:
        connection.sendall(post_head(len(body), "/v1/chat/completions") + body)
        if stream:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        while not engine.jobs:
            pass
        assert not engine.jobs[0].future.done()
        connection.close()
        while not engine.jobs[0].future.done():
            pass
    assert engine.jobs[0].future.cancelled()
    assert server.chat(user("Hello")).ok


def test_the_request_of_lmms_eval(client, model_id):
    # As its model `async_openai` sends it, for a model that thinks too.
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": [*user(RED, QUESTION)["content"]]}],
        model=model_id,
        max_tokens=4,
        temperature=0,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )
    assert isinstance(answer.choices[0].message.content, str)
