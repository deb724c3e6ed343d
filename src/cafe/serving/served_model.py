"""A `Cafe` for many threads: its forward passes are jobs of an engine, which packs them with those of others."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from cafe.lvlm.generation import StoppableStreamer
from cafe.model import Cafe
from cafe.packing import Branch, PackingConfig
from cafe.serving.engine import Engine
from cafe.serving.image_workers import ImageWorkers
from cafe.serving.jobs import ChatJob, DeadlineError, EmbedJob, Job, Piece, Sampling

POLL_SECONDS = 0.2  # between looks at whether a streamed answer is still read
GRACE_SECONDS = 5.0  # past its deadline for which a job is waited for; the engine gives it up itself


@dataclass
class ServedModel(Cafe):
    """Embed and generate with a model that an engine runs.

    Any thread may use it. All methods raise `OverloadedError`, `NotReadyError`, `DeadlineError` and `EngineError` of
    `cafe.serving.jobs`, besides those of `Cafe`.

    Attributes:
        engine: runs the model.
        timeout: seconds until a job is given up.
    """

    engine: Engine = field(kw_only=True)
    timeout: float = field(default=120.0, kw_only=True)

    @classmethod
    def of(cls, engine: Engine, images: ImageWorkers, timeout: float = 120.0) -> "ServedModel":
        """Make the served model of an engine, whose images are read by workers."""
        model = engine.model
        # Both kinds of objects have the methods that a chat processor calls.
        chat_processor = model.chat_processor.with_images(images)  # type: ignore[arg-type]
        parts = (model.lvlm, chat_processor, model.packing, model.metadata, model.name)
        return cls(*parts, engine=engine, timeout=timeout)

    def embed_branches(
        self, branches: Sequence[Branch], dim: int | None = None, packing: PackingConfig | None = None
    ) -> Float32[np.ndarray, "contents dim"]:
        """Embed encoded contents; they are packed as the engine does."""
        # A job for each, so that the engine reads them with those of others.
        jobs = [EmbedJob(branch=branch, timeout=self.timeout) for branch in branches]
        vectors: Float32[np.ndarray, "contents dim"] = np.stack(self._results(jobs))[:, :dim]
        if dim is not None:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def embed_and_generate_branches(
        self, pairs: Sequence[tuple[Branch, Branch]], kwargs: dict[str, Any]
    ) -> tuple[Float32[np.ndarray, "images dim"], list[str]]:
        """Embed encoded images and answer encoded prompts about them."""
        vectors = self.embed_branches([embedding for embedding, _ in pairs])
        return vectors, self._generate([prompt for _, prompt in pairs], **kwargs)

    def _generate(
        self, prompts: Sequence[Branch], streamer: StoppableStreamer | None = None, **kwargs: Any
    ) -> list[str]:
        """Generate the answers to encoded prompts, by arguments of transformers' `generate`."""
        sampling = Sampling(
            max_tokens=kwargs["max_new_tokens"],
            temperature=kwargs.get("temperature", 0.0),
            top_p=kwargs.get("top_p", 1.0),
        )
        pieces: list[list[Piece]] = [[] for _ in prompts]
        jobs = []
        for prompt, own in zip(prompts, pieces, strict=True):
            on_piece = own.append if streamer is None else _pass_on(own, streamer)
            jobs.append(ChatJob(branch=prompt, timeout=self.timeout, sampling=sampling, on_piece=on_piece))
        self._results(jobs, streamer)
        return ["".join(piece.text for piece in own) for own in pieces]

    def _score(self, dialogues: Sequence[Sequence[Branch]]) -> list[Float[np.ndarray, " answers"]]:
        """Compute the log-likelihood of the supervised tokens of some contents' dialogues, between two steps."""
        scores = self.engine.run(lambda: self.engine.model._score(dialogues))
        try:
            return scores.result(self.timeout)
        except TimeoutError:
            scores.cancel()
            raise DeadlineError from None

    def _results(self, jobs: Sequence[Job], streamer: StoppableStreamer | None = None) -> list[Any]:
        """Submit jobs and return their results; if one of them fails, the others are cancelled.

        Raises:
            InterruptedError: nobody reads the stream any more.
        """
        try:
            # All at once, so that the engine reads them together.
            for job in jobs:
                self.engine.submit(job)
            return [_wait(job, streamer) for job in jobs]
        except CancelledError:
            raise InterruptedError("The stream was closed.") from None
        finally:
            for job in jobs:
                job.future.cancel()


def _pass_on(pieces: list[Piece], streamer: StoppableStreamer) -> Callable[[Piece], None]:
    """Return a function that notes pieces of an answer and puts their text into a stream."""

    def on_piece(piece: Piece) -> None:
        """Take a piece."""
        pieces.append(piece)
        streamer.on_finalized_text(piece.text, stream_end=piece.finish_reason is not None)

    return on_piece


def _wait(job: Job, streamer: StoppableStreamer | None) -> Any:
    """Wait for a job, and cancel it if its answer is not read any more.

    Raises:
        DeadlineError: the engine does not even give it up.
    """
    # The engine fails what is late, but not while a step of it hangs.
    end = job.created + job.timeout + GRACE_SECONDS
    while True:
        seconds = max(end - time.monotonic(), 0.0)
        try:
            return job.future.result(seconds if streamer is None else min(seconds, POLL_SECONDS))
        except TimeoutError:
            if streamer is not None and streamer.stopped.is_set():
                job.future.cancel()
            elif time.monotonic() > end:
                raise DeadlineError from None
