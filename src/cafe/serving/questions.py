"""Ask the model about images of a collection, in one turn or in several, and stream the answer."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from cafe.content import Content, ImageRef
from cafe.index.asking import NOTHING_FOUND, question_content
from cafe.index.searching import Hit
from cafe.serving.contents import chat_turn
from cafe.serving.errors import describe_error
from cafe.serving.jobs import ChatJob, Piece, Sampling
from cafe.serving.requests import encode
from cafe.serving.search_schemas import AskRequest, FoundImage
from cafe.serving.services import Services
from cafe.serving.streaming import Mailbox, chat_pieces, make_event, submit_all


@dataclass(frozen=True)
class RunningQuestion:
    """Hold a question that the model is answering.

    Attributes:
        job: answers it.
        mailbox: where the pieces of the answer come.
        timeout: seconds after which it is given up.
    """

    job: ChatJob
    mailbox: Mailbox[Piece | None]
    timeout: float


async def submit_question(
    request: AskRequest, hits: Sequence[Hit], refs: Sequence[ImageRef], services: Services
) -> RunningQuestion | None:
    """Hand a question to the engine; None if there is no image that it could be about.

    Args:
        request: the question.
        hits: what it is about.
        refs: the image of each hit.
        services: of the server.

    Raises:
        ApiError: the images cannot be read, or are too many for the model.
        OverloadedError, NotReadyError: the engine does not take it.
    """
    if not hits:
        return None
    # Made here, in the event loop that it wakes.
    mailbox: Mailbox[Piece | None] = Mailbox()
    messages = [chat_turn(role, content) for role, content in _turns(request, hits, refs)]
    sampling = Sampling(max_tokens=request.max_tokens)

    def make_job() -> ChatJob:
        """Encode the question."""
        return encode(
            lambda: services.encoder.chat(messages, refs, sampling=sampling, on_piece=mailbox.put), refs, "question"
        )

    # Away from the loop, because the images have to be decoded.
    job = await run_in_threadpool(make_job)
    submit_all(services, [job])
    return RunningQuestion(job, mailbox, services.config.limits.timeout)


def _turns(request: AskRequest, hits: Sequence[Hit], refs: Sequence[ImageRef]) -> list[tuple[str, Content]]:
    """Return the conversation so far: the images are in its first turn."""
    # Later turns repeat no image, so that the first turn is a prefix that the model has read before.
    questions = [*(turn.question for turn in request.history), request.question]
    turns = [("user", question_content(questions[0], hits, refs))]
    for earlier, question in zip(request.history, questions[1:], strict=True):
        turns += [("assistant", Content((earlier.answer,))), ("user", Content((question,)))]
    return turns


async def answer_events(
    sources: Sequence[FoundImage], question: RunningQuestion | None, request_id: str
) -> AsyncIterator[str]:
    """Yield the events of an answer. Closing the iterator, as when a client goes away, ends the generation.

    Args:
        sources: what the answer cites.
        question: is being answered; None if there is nothing to answer it from.
        request_id: of the request, for the log.
    """
    try:
        # Before the model has read anything, so that a reader sees at once what the answer is about.
        yield make_event({"sources": [source.model_dump(mode="json") for source in sources]})
        if question is None:
            yield make_event({"text": NOTHING_FOUND})
            yield make_event({"done": "stop"})
            return
        async for pieces in chat_pieces(question.job, question.mailbox, question.timeout):
            if text := "".join(piece.text for piece in pieces):
                yield make_event({"text": text})
        yield make_event({"done": question.job.future.result()})
    except Exception as error:
        # The status was sent long ago.
        yield make_event(describe_error(error, request_id).body())
    finally:
        if question is not None:
            question.job.future.cancel()  # of a client that went before the first piece
