"""`/v1/chat/completions`: chats with images, answered at once or as a stream."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from cafe.serving.answers import ERROR_ANSWERS, ChatAnswer
from cafe.serving.contents import ContentReader
from cafe.serving.errors import ApiError, describe_error, request_id_of
from cafe.serving.jobs import ChatJob, FinishReason, Piece, Sampling
from cafe.serving.requests import check_model_id, encode, run_encoding
from cafe.serving.schemas import MAX_DEFAULT_TOKENS, UNSUPPORTED, ChatRequest
from cafe.serving.services import Services, ServicesDep
from cafe.serving.streaming import EventStream, Mailbox, chat_pieces, make_event, submit_all, while_connected

router = APIRouter(responses=ERROR_ANSWERS)


@dataclass
class Answer:
    """Hold an answer that is being generated.

    Attributes:
        job: generates it.
        mailbox: where its pieces come.
        model_id: the model's name.
        id: the answer's.
        created: the time it was begun.
        num_tokens: those generated so far.
        finish_reason: why it ended, once it has.
    """

    job: ChatJob
    mailbox: Mailbox[Piece | None]
    model_id: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    num_tokens: int = 0
    finish_reason: FinishReason | None = None

    async def texts(self, timeout: float) -> AsyncIterator[list[str]]:
        """Yield the texts of the pieces as they come, several at once if they came together.

        Raises:
            EngineError, DeadlineError: the answer ends before it is complete.
        """
        async for pieces in chat_pieces(self.job, self.mailbox, timeout):
            self.num_tokens = pieces[-1].num_tokens
            self.finish_reason = pieces[-1].finish_reason
            yield [piece.text for piece in pieces if piece.text]

    def usage(self) -> dict[str, Any]:
        """Count the tokens, those of images too."""
        # Tokens of images count as the model reads them: as many as its vision tower gives.
        branch = self.job.branch
        return {
            "prompt_tokens": len(branch),
            "completion_tokens": self.num_tokens,
            "total_tokens": len(branch) + self.num_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.job.cached_tokens,
                "image_tokens": int(branch.image_mask.sum()),
            },
        }


@router.post(
    "/v1/chat/completions",
    response_model=ChatAnswer,
    responses={200: {"content": {"text/event-stream": {}}}},
    summary="Answer a chat with images",
)
async def create_chat_completion(body: ChatRequest, request: Request, services: ServicesDep) -> Response:
    """Answer a chat, whose turns hold texts and images in any order.

    With `stream`, the answer comes as server-sent events, the last of which is `[DONE]`.
    """
    return await while_connected(request, _answer(body, request, services))


async def _answer(body: ChatRequest, request: Request, services: Services) -> Response:
    """Answer what a request holds."""
    check_model_id(body.model, services)
    check_supported(body)
    answer = await start_answer(body, services)
    timeout = services.config.limits.timeout
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = stream_events(answer, timeout, include_usage, request_id_of(request))
        return EventStream(events, answer.job)

    # Not in the loop below `stream`: here, an error still becomes a status.
    text = "".join([text async for texts in answer.texts(timeout) for text in texts])
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
    return JSONResponse(
        {
            "id": answer.id,
            "object": "chat.completion",
            "created": answer.created,
            "model": answer.model_id,
            "choices": [choice],
            "usage": answer.usage(),
        }
    )


async def start_answer(body: ChatRequest, services: Services) -> Answer:
    """Have the engine begin to answer a chat.

    Raises:
        ApiError: something in the request cannot be used.
        OverloadedError, NotReadyError: the engine does not take it.
    """
    sampling = read_sampling(body, services)
    mailbox: Mailbox[Piece | None] = Mailbox()

    def make_job() -> ChatJob:
        """Encode the chat."""
        messages, refs = ContentReader(services.config).read_chat(body.messages)
        return encode(
            lambda: services.encoder.chat(messages, refs, sampling=sampling, on_piece=mailbox.put), refs, "messages"
        )

    # Only parts can have images; words alone are encoded faster than a thread is started.
    has_parts = any(isinstance(message.content, list) for message in body.messages)
    num_characters = sum(len(message.content) for message in body.messages if isinstance(message.content, str))
    job = await run_encoding(make_job, has_parts, num_characters)
    submit_all(services, [job])
    return Answer(job, mailbox, services.model_id)


def read_sampling(body: ChatRequest, services: Services) -> Sampling:
    """Return how a request wants its answer generated.

    Raises:
        ApiError: it asks for more than is allowed.
    """
    limits = services.config.limits
    # The newer name first: clients that know it send the other for old servers.
    max_tokens = body.max_completion_tokens or body.max_tokens or min(MAX_DEFAULT_TOKENS, limits.max_new_tokens)
    if max_tokens > limits.max_new_tokens:
        message = f"An answer has at most {limits.max_new_tokens} tokens, not {max_tokens}."
        raise ApiError(400, "invalid_value", message, "max_tokens")
    # An empty sequence is in every text.
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > limits.max_stop or not all(stop):
        message = f"There are at most {limits.max_stop} stop sequences, none of them empty."
        raise ApiError(400, "invalid_value", message, "stop")
    if any(len(text) > limits.max_stop_characters for text in stop):
        message = f"A stop sequence has at most {limits.max_stop_characters} characters."
        raise ApiError(400, "invalid_value", message, "stop")
    # OpenAI's default temperature, so that clients get what they expect.
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    return Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=body.seed, stop=tuple(stop))


def check_supported(body: ChatRequest) -> None:
    """Refuse parameters of OpenAI's that would change the answer and are not supported.

    Raises:
        ApiError: there is one.
    """
    for name, values in UNSUPPORTED.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            only = " or ".join(json.dumps(each) for each in values)
            hint = f" other than {only}" if only else ""
            raise ApiError(400, "unsupported_value", f"{name}{hint} is not supported.", name)


async def stream_events(answer: Answer, timeout: float, include_usage: bool, request_id: str) -> AsyncIterator[str]:
    """Yield an answer as server-sent events; an error ends it with an event of its own.

    Args:
        answer: what is streamed.
        timeout: seconds after which it is given up.
        include_usage: whether an event with the number of tokens comes last.
        request_id: of the request, for the log.
    """
    try:
        # Before the model has read the chat, so that clients see at once that it was taken.
        yield chunk_event(answer, [{"role": "assistant", "content": ""}])
        async for texts in answer.texts(timeout):
            if texts:
                yield chunk_event(answer, [{"content": text} for text in texts])
        yield chunk_event(answer, [{}], answer.finish_reason)
        if include_usage:
            yield make_event(_chunk(answer, [], answer.usage()))
        yield "data: [DONE]\n\n"
    except Exception as error:
        # The status was sent long ago.
        yield make_event(describe_error(error, request_id).body())


def chunk_event(
    answer: Answer, deltas: Sequence[dict[str, Any]], finish_reason: FinishReason | None = None, **fields: Any
) -> str:
    """Return the events of some pieces of an answer, with further fields."""
    events = []
    for delta in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        events.append(make_event({**_chunk(answer, [choice]), **fields}))
    return "".join(events)


def _chunk(answer: Answer, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a chunk of a streamed answer."""
    chunk = {
        "id": answer.id,
        "object": "chat.completion.chunk",
        "created": answer.created,
        "model": answer.model_id,
        "choices": choices,
    }
    return chunk if usage is None else {**chunk, "usage": usage}
