"""`/v1/embeddings`: texts, images and both, in the shapes of OpenAI, Jina and vLLM."""

import base64
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from jaxtyping import Float32

from cafe.content import Content
from cafe.serving.answers import ERROR_ANSWERS, EmbeddingsAnswer
from cafe.serving.contents import ContentReader
from cafe.serving.errors import ApiError
from cafe.serving.jobs import EmbedJob
from cafe.serving.requests import check_model_id, encode, run_encoding
from cafe.serving.schemas import ChatMessage, EmbeddingsRequest, Item
from cafe.serving.services import Services, ServicesDep
from cafe.serving.streaming import run_jobs, while_connected

router = APIRouter(responses=ERROR_ANSWERS)


@router.post("/v1/embeddings", response_model=EmbeddingsAnswer, summary="Embed texts and images")
async def create_embeddings(body: EmbeddingsRequest, request: Request, services: ServicesDep) -> Response:
    """Embed one input or several, as unit vectors, in the order given."""
    return await while_connected(request, _answer(body, services))


async def _answer(body: EmbeddingsRequest, services: Services) -> Response:
    """Embed what a request holds."""
    # What costs nothing is checked first.
    check_model_id(body.model, services)
    _check_dimensions(body.dimensions, services)
    contents = await run_encoding(lambda: read_contents(body, services), _has_images(body))
    jobs, vectors = await embed(services, contents, "messages" if body.messages else "input")
    data = [
        {"object": "embedding", "index": index, "embedding": format_vector(vector, body)}
        for index, vector in enumerate(vectors)
    ]
    return JSONResponse(
        {"object": "list", "model": services.model_id, "data": data, "usage": token_usage(jobs)},
    )


async def embed(
    services: Services, contents: Sequence[Content], where: str
) -> tuple[list[EmbedJob], list[Float32[np.ndarray, " dim"]]]:
    """Embed contents together, and return their jobs and their vectors.

    Args:
        services: of the server.
        contents: what is embedded; one that cannot be read fails the request.
        where: what they are called in messages, without their numbers.

    Raises:
        ApiError: a content cannot be read.
    """

    def make_jobs() -> list[EmbedJob]:
        """Encode the contents."""
        return [
            encode(partial(services.encoder.embedding, content), content.images, f"{where}.{index}")
            for index, content in enumerate(contents)
        ]

    # All of a request are submitted together, so that the engine packs them.
    num_characters = sum(len(part) for content in contents for part in content.parts if isinstance(part, str))
    jobs = await run_encoding(make_jobs, any(content.images for content in contents), num_characters)
    return jobs, await run_jobs(services, jobs)


def read_contents(body: EmbeddingsRequest, services: Services) -> list[Content]:
    """Read the inputs of a request.

    Raises:
        ApiError: there are none, too many, or one cannot be used.
    """
    if (body.input is None) == (body.messages is None):
        raise ApiError(400, "invalid_value", "A request has either input or messages.", "input")
    reader = ContentReader(services.config)
    inputs: Sequence[Any] = _as_list(body.input) if body.messages is None else _as_conversations(body.messages)
    _check_number(inputs, services)
    if body.messages is not None:
        return [reader.read_conversation(turns, f"messages.{index}") for index, turns in enumerate(inputs)]
    return [reader.read_input(value, f"input.{index}") for index, value in enumerate(inputs)]


def format_vector(vector: Float32[np.ndarray, " dim"], body: EmbeddingsRequest) -> list[float] | str:
    """Return a vector as a request wants it: its first dimensions, as numbers or as base64."""
    # Models that are trained for it keep what matters most in the first dimensions.
    if body.dimensions and body.dimensions < len(vector):
        vector = vector[: body.dimensions]
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    if (body.encoding_format or body.embedding_type) == "base64":
        # OpenAI's order of bytes, whatever this machine's is.
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


def token_usage(jobs: Sequence[Any]) -> dict[str, int]:
    """Count the tokens that jobs read."""
    num_tokens = sum(len(job.branch) for job in jobs)
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _as_list(value: Any) -> Sequence[Any]:
    """Return the inputs as a list.

    Raises:
        ApiError: they are token ids, which may be another tokenizer's.
    """
    values = value if isinstance(value, list) else [value]
    # The token ids of another tokenizer would give vectors of other words, in silence.
    if any(isinstance(each, int | list) for each in values):
        message = "Inputs are texts or images, not token ids (LangChain: check_embedding_ctx_length=False)."
        raise ApiError(400, "unsupported_value", message, "input")
    return values


def _as_conversations(messages: Sequence[Any]) -> Sequence[Sequence[ChatMessage]]:
    """Return one conversation or a list of them as a list."""
    if messages and isinstance(messages[0], ChatMessage):
        return [messages]
    return messages


def _check_number(inputs: Sequence[Any], services: Services) -> None:
    """Make sure that there are inputs, and not too many."""
    most = services.config.limits.max_inputs
    if not 0 < len(inputs) <= most:
        raise ApiError(400, "invalid_value", f"A request has 1 to {most} inputs, not {len(inputs)}.", "input")


def _check_dimensions(dimensions: int | None, services: Services) -> None:
    """Make sure that embeddings have the dimensions that are asked for."""
    width = services.model.lvlm.config.get_text_config().hidden_size
    if dimensions and dimensions > width:
        message = f"Embeddings of this model have {width} dimensions, not {dimensions}."
        raise ApiError(400, "invalid_value", message, "dimensions")


def _has_images(body: EmbeddingsRequest) -> bool:
    """Tell whether decoding the images of a request may take long."""
    # Conversations are taken to have images: to look for them costs as much as a thread.
    if body.messages is not None:
        return True
    values = body.input if isinstance(body.input, list) else [body.input]
    return any(isinstance(value, Item) for value in values)
