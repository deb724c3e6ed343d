"""What requests hold. Unknown fields are refused: a parameter that is ignored in silence gives wrong answers."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_DEFAULT_TOKENS = 1024  # of an answer whose request has no max_tokens
MAX_FIELDS = 64  # of an object

Value = TypeVar("Value")
# A list whose first bad item is the only error: millions of bad ones would fill the memory with errors.
Items = Annotated[list[Value], Field(fail_fast=True)]
Count = Annotated[int, Field(ge=1)]
Role = Literal["system", "developer", "user", "assistant"]


class Strict(BaseModel):
    """Refuse unknown fields, values of another type, and numbers that are none."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _limit_fields(cls, value: Any) -> Any:
        """Refuse an object of many fields, each of which would be an error of its own.

        Raises:
            ValueError: it has too many.
        """
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"There are more than {MAX_FIELDS} fields.")
        return value


class ImageUrl(Strict):
    """Hold an image, as a data URI."""

    url: str
    detail: str | None = None  # images are read as the model was trained


class ChatPart(Strict):
    """Hold a text or an image of a turn: "type" is text or image_url."""

    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None


class ChatMessage(Strict):
    """Hold a turn of a chat. The fields of answers that clients send back are taken if they are empty."""

    role: Role
    content: str | Items[ChatPart] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: Items[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[Items[Any], Field(max_length=0)] | None = None


class Item(Strict):
    """Hold an input with a text, an image or both, the image first (Jina), or parts of a turn (vLLM)."""

    text: str | None = None
    image: str | None = None
    content: Items[ChatPart] | None = None


Input = str | Item


class EmbeddingsRequest(Strict):
    """Hold what is to be embedded: "input", or "messages" with a conversation or a list of them."""

    model: str | None = None
    input: Input | Items[Input] | Items[int] | Items[Items[int]] | None = None
    messages: Items[ChatMessage] | Items[Items[ChatMessage]] | None = None
    dimensions: Count | None = None
    encoding_format: Literal["float", "base64"] | None = None
    embedding_type: Literal["float", "base64"] | None = None  # Jina's name of the same
    normalized: Literal[True] | None = None  # as all embeddings are
    user: str | None = None


class StreamOptions(Strict):
    """Say what a stream has besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # pads pieces, which is not done here


class ChatRequest(Strict):
    """Hold a chat that is to be answered."""

    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: str | Items[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    # What changes nothing here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None
    # What is taken with the value alone that changes nothing, see `UNSUPPORTED`.
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    modalities: Items[str] | None = None
    tools: Items[Any] | None = None
    tool_choice: Any = None
    functions: Items[Any] | None = None
    function_call: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


# The values, besides null, with which a parameter of OpenAI's changes nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
}


class RerankRequest(Strict):
    """Hold documents that are to be ranked by how well they match a query."""

    query: Input
    documents: Annotated[Items[Input], Field(min_length=1)]
    model: str | None = None
    top_n: Count | None = None
    return_documents: bool | None = None


class ScoreRequest(Strict):
    """Hold pairs whose similarity is asked for: one of the first with each of the second, or as many of both."""

    text_1: Input | Annotated[Items[Input], Field(min_length=1)]
    text_2: Input | Annotated[Items[Input], Field(min_length=1)]
    model: str | None = None
    encoding_format: Literal["float"] | None = None
    user: str | None = None
