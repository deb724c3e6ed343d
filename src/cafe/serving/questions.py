"""Ask the model about images of a collection, in one turn or in several, and stream the answer."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi.concurrency import run_in_threadpool

from cafe.content import Content, Dialogue, ImageRef, Turn
from cafe.index.asking import NOTHING_FOUND, question_content
from cafe.index.searching import Hit
from cafe.lvlm.prompts import dialogue_messages
from cafe.serving.jobs import ChatJob, DeadlineError, Piece, Sampling
from cafe.serving.search_schemas import AskRequest, FoundImage
from cafe.serving.services import Services


@dataclass(frozen=True)
class RunningQuestion:
    """Hold a question that the model is answering.

    Attributes:
        job: what the model does.
        pieces: of the answer, as they come; None when there are no more.
    """

    job: ChatJob
    pieces: "asyncio.Queue[Piece | None]"


async def submit_question(
    request: AskRequest, hits: Sequence[Hit], refs: Sequence[ImageRef], services: Services
) -> RunningQuestion | None:
    """Hand a question to the engine; None if there is no image that it could be about.

    Raises:
        RecordError: an image cannot be read.
        ContextLengthError: question and images are too long.
        OverloadedError: too much is waiting.
    """
    if not hits:
        return None
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[Piece | None] = asyncio.Queue()

    def push(piece: Piece | None) -> None:
        """Hand a piece from the engine's thread to the server's."""
        with suppress(RuntimeError):  # the server may have ended
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    dialogue = Dialogue(tuple(_turns(request, hits, refs)))
    messages = dialogue_messages(dialogue, services.model.chat_processor.prompts)
    sampling = Sampling(max_tokens=request.max_tokens)
    job = await run_in_threadpool(services.encoder.chat, messages, refs, sampling=sampling, on_piece=push)
    services.engine.submit(job)
    job.future.add_done_callback(lambda _: push(None))
    return RunningQuestion(job, pieces)


def _turns(request: AskRequest, hits: Sequence[Hit], refs: Sequence[ImageRef]) -> list[Turn]:
    """Return the conversation so far: the images are in its first turn."""
    questions = [*(turn.question for turn in request.history), request.question]
    turns = [Turn("user", question_content(questions[0], hits, refs))]
    for earlier, question in zip(request.history, questions[1:], strict=True):
        turns += [Turn("assistant", Content((earlier.answer,))), Turn("user", Content((question,)))]
    return turns


async def answer_events(sources: Sequence[FoundImage], question: RunningQuestion | None) -> AsyncIterator[str]:
    """Yield the events of an answer. Closing the iterator, as when a client goes away, ends the generation."""
    yield _event(sources=[source.model_dump(mode="json") for source in sources])
    if question is None:
        yield _event(text=NOTHING_FOUND)
        yield _event(done="stop")
        return
    try:
        # The engine hands over pieces before it sets the result.
        while piece := await question.pieces.get():
            if piece.text:
                yield _event(text=piece.text)
        yield _end_event(question.job)
    finally:
        question.job.future.cancel()


def _end_event(job: ChatJob) -> str:
    """Return the last event: why the answer ended."""
    if job.future.cancelled():
        return _event(error={"message": "The answer was cancelled."})
    error = job.future.exception()
    if isinstance(error, DeadlineError):
        return _event(error={"message": "The answer took too long."})
    if error:
        return _event(error={"message": "The model could not answer."})
    return _event(done=job.future.result())


def _event(**fields: Any) -> str:
    """Return a server-sent event with a JSON object."""
    return f"data: {json.dumps(fields)}\n\n"
