"""`/v1/rerank` and `/v1/score`: how well documents match a query, by the model's own yes or no, or by embeddings."""

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from jaxtyping import Float32

from cafe.content import Content
from cafe.lvlm.images import ProcessedImages
from cafe.lvlm.processing import ChatProcessor
from cafe.serving.answers import ERROR_ANSWERS, RerankAnswer, ScoreAnswer
from cafe.serving.contents import ContentReader, chat_turn
from cafe.serving.errors import ApiError
from cafe.serving.jobs import ScoreJob
from cafe.serving.requests import check_model_id, encode, run_encoding
from cafe.serving.routes.embeddings import embed, token_usage
from cafe.serving.schemas import Input, RerankRequest, ScoreRequest
from cafe.serving.services import Services, ServicesDep
from cafe.serving.streaming import run_jobs, while_connected

router = APIRouter(responses=ERROR_ANSWERS)

# Models begin their answers with either. The probabilities of both are added.
YES, NO = ("yes", "Yes"), ("no", "No")


@router.post("/v1/rerank", response_model=RerankAnswer, summary="Rank documents by a query")
async def rerank(body: RerankRequest, request: Request, services: ServicesDep) -> Response:
    """Rank texts and images by how likely the model says yes to the question whether each matches the query."""
    return await while_connected(request, _rerank(body, services))


@router.post("/v1/score", response_model=ScoreAnswer, summary="Compare pairs by their embeddings")
async def score(body: ScoreRequest, request: Request, services: ServicesDep) -> Response:
    """Return the cosine similarity of the embeddings of each pair."""
    return await while_connected(request, _score(body, services))


async def _rerank(body: RerankRequest, services: Services) -> Response:
    """Rank the documents of a request."""
    check_model_id(body.model, services)
    _check_number(body.documents, services, "documents")
    words = answer_words(services.encoder.chat_processor)

    def make_jobs() -> list[ScoreJob]:
        """Encode the question about each document."""
        reader = ContentReader(services.config)
        query = reader.read_input(body.query, "query")
        documents = [reader.read_input(value, f"documents.{index}") for index, value in enumerate(body.documents)]
        jobs = []
        for index, document in enumerate(documents):
            question = match_question(query, document)
            turns, tokens = [chat_turn("user", question)], (*words.yes, *words.no)
            ask = partial(services.encoder.score, turns, question.images, tokens, words.beginning)
            jobs.append(encode(ask, question.images, f"documents.{index}"))
        return jobs

    # The query is in each question.
    texts = [value for value in (*body.documents, *[body.query] * len(body.documents)) if isinstance(value, str)]
    jobs = await run_encoding(make_jobs, _has_items([body.query, *body.documents]), sum(map(len, texts)))
    # Each document is a prompt of its own, so scores do not depend on what else is ranked.
    relevances = [relevance(logits, len(words.yes)) for logits in await run_jobs(services, jobs)]
    # Equal ones stay in their order.
    best_first = sorted(range(len(jobs)), key=lambda index: -relevances[index])[: body.top_n]
    results = []
    for index in best_first:
        result: dict[str, Any] = {"index": index, "relevance_score": relevances[index]}
        if body.return_documents:
            result["document"] = _echo(body.documents[index])
        results.append(result)
    identity = f"rerank-{secrets.token_hex(12)}"
    usage = token_usage(jobs)
    return JSONResponse({"id": identity, "model": services.model_id, "results": results, "usage": usage})


async def _score(body: ScoreRequest, services: Services) -> Response:
    """Compare the pairs of a request."""
    check_model_id(body.model, services)
    first = body.text_1 if isinstance(body.text_1, list) else [body.text_1]
    second = body.text_2 if isinstance(body.text_2, list) else [body.text_2]
    if len(first) not in (1, len(second)):
        message = f"There are {len(first)} in text_1 and {len(second)} in text_2: give one, or as many."
        raise ApiError(400, "invalid_value", message, "text_1")
    inputs = [*first, *second]
    _check_number(inputs, services, "text_2")

    def read() -> list[Content]:
        """Read both sides."""
        reader = ContentReader(services.config)
        return [
            reader.read_input(value, "text_1" if row < len(first) else "text_2") for row, value in enumerate(inputs)
        ]

    # Both sides are embedded together.
    contents = await run_encoding(read, _has_items(inputs))
    jobs, vectors = await embed(services, contents, "text")
    # One of the first side is compared with each of the second.
    lefts, rights = np.stack(vectors[: len(first)]), np.stack(vectors[len(first) :])
    scores = (lefts * rights).sum(1)
    data = [{"object": "score", "index": index, "score": float(value)} for index, value in enumerate(scores)]
    return JSONResponse(
        {
            "id": f"score-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
            "model": services.model_id,
            "data": data,
            "usage": token_usage(jobs),
        }
    )


def match_question(query: Content, document: Content) -> Content:
    """Ask whether a document matches a query; the document comes first, so that its image is read once for many."""
    return Content((*document.parts, '\nDoes this match "', *query.parts, '"? Answer yes or no.'))


@dataclass(frozen=True)
class AnswerWords:
    """Hold the tokens by which a model says yes and no.

    Attributes:
        yes, no: the tokens in which the answers differ, in lower case and not.
        beginning: the tokens before them, with which all answers begin, such as those of an empty thought.
    """

    yes: tuple[int, ...]
    no: tuple[int, ...]
    beginning: tuple[int, ...]


def answer_words(chat_processor: ChatProcessor) -> AnswerWords:
    """Return how a model answers yes and no.

    Raises:
        ApiError: it has no tokens of these words.
    """
    yes, no = ([_answer_tokens(chat_processor, word) for word in words] for words in (YES, NO))
    # What all four begin with ends where a place has several tokens.
    place = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*yes, *no, strict=False)))
    yes_next, no_next = ({tokens[place] for tokens in answers if len(tokens) > place} for answers in (yes, no))
    # What both have says nothing, such as the token of unknown words.
    both = yes_next & no_next
    if not yes_next - both or not no_next - both:
        raise ApiError(400, "unsupported_value", "This model cannot rank: it has no tokens for yes and no.", "model")
    return AnswerWords(tuple(sorted(yes_next - both)), tuple(sorted(no_next - both)), tuple(yes[0][:place]))


def _answer_tokens(chat_processor: ChatProcessor, word: str) -> list[int]:
    """Return the tokens that a model predicts, if it answers with a word."""
    turns = [chat_turn("user", Content(("a",))), chat_turn("assistant", Content((word,)))]
    # As in training: a word that follows a prompt may have other tokens than one within a text.
    branch = chat_processor.encode_dialogue(turns, ProcessedImages([], {}))
    tokens: list[int] = branch.input_ids[branch.loss_mask].tolist()
    return tokens


def relevance(logits: Float32[np.ndarray, " tokens"], num_yes: int) -> float:
    """Return the probability of yes, where the answer is yes or no.

    Args:
        logits: of the tokens for yes, and then of those for no.
        num_yes: the number of tokens for yes.
    """
    # In double precision: the sums of exponentials of large logits are close to each other.
    wide = logits.astype(np.float64)
    difference = float(np.logaddexp.reduce(wide[:num_yes]) - np.logaddexp.reduce(wide[num_yes:]))
    # In the form that does not overflow.
    return 1 / (1 + math.exp(-difference)) if difference >= 0 else math.exp(difference) / (1 + math.exp(difference))


def _check_number(values: Sequence[Any], services: Services, where: str) -> None:
    """Make sure that there are not too many inputs."""
    most = services.config.limits.max_inputs
    if len(values) > most:
        raise ApiError(400, "invalid_value", f"A request has at most {most} inputs, not {len(values)}.", where)


def _has_items(values: Sequence[Input]) -> bool:
    """Tell whether there may be images among inputs."""
    return any(not isinstance(value, str) for value in values)


def _echo(document: Input) -> dict[str, Any]:
    """Return a document as it was sent."""
    return {"text": document} if isinstance(document, str) else document.model_dump(exclude_none=True)
