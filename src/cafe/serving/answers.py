"""What answers hold, as OpenAI, Jina and vLLM name it. They document the answers; routes write them themselves."""

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """Say what is wrong with a request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Hold an error."""

    error: ErrorDetail


class TokenUsage(BaseModel):
    """Count the tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class PromptDetails(BaseModel):
    """Say which of a prompt's tokens were images', and which were read for an earlier request."""

    cached_tokens: int
    image_tokens: int


class ChatUsage(TokenUsage):
    """Count the tokens that were read and generated."""

    completion_tokens: int
    prompt_tokens_details: PromptDetails


class Embedding(BaseModel):
    """Hold an embedding: numbers, or the base64 of float32 numbers, least significant byte first."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(BaseModel):
    """Hold embeddings, in the order of the inputs."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: TokenUsage


class AnswerMessage(BaseModel):
    """Hold the assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(BaseModel):
    """Hold an answer, and why it ended."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None


class ChatAnswer(BaseModel):
    """Hold the answer to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage


class Ranked(BaseModel):
    """Hold the relevance of a document, from 0 to 1."""

    index: int
    relevance_score: float
    document: dict[str, Any] | None = None


class RerankAnswer(BaseModel):
    """Hold documents, the most relevant first."""

    id: str
    model: str
    results: list[Ranked]
    usage: TokenUsage


class Score(BaseModel):
    """Hold the cosine similarity of a pair."""

    object: Literal["score"]
    index: int
    score: float


class ScoreAnswer(BaseModel):
    """Hold the similarities of pairs, in their order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: TokenUsage


class ModelCard(BaseModel):
    """Name the model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """Hold the one model that is served."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """Say whether the server can answer.

    Attributes:
        status: error if the model's thread has died or hangs, or if there has been no image worker for five seconds.
        heartbeat_age: seconds since the last sign of life of the model's thread.
        waiting: jobs that wait for the model.
        image_workers: processes that can read images.
    """

    status: Literal["ok", "error"]
    heartbeat_age: float
    waiting: int
    image_workers: int


class Readiness(BaseModel):
    """Say that requests are taken."""

    status: Literal["ready"]


# Every route can refuse a request so; FastAPI takes this for its documentation.
_DESCRIPTIONS = {
    400: "Something in the request cannot be used.",
    401: "The API key is missing or wrong.",
    403: "The `Host` or `Origin` header is not this server's.",
    404: "There is no such model or address.",
    405: "The address does not take this method.",
    408: "The body arrived too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON, or compressed.",
    422: "A field is missing, or has a value of another type.",
    429: "The server is busy; `Retry-After` says for how many seconds.",
    500: "The server failed.",
    503: "The server is starting or stopping, or the model does not answer.",
    504: "The request was not done in time.",
}
ERROR_ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description} for status, description in _DESCRIPTIONS.items()
}
