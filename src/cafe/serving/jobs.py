"""One unit of work for the model, and what becomes of it."""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from cafe.packing import Branch

FinishReason = Literal["stop", "length"]


class EngineError(Exception):
    """Report that the model could not do a job. Requests are answered with status 500."""


class OverloadedError(Exception):
    """Report that too much is waiting already. Requests are answered with status 429.

    Attributes:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__("The server is busy.")
        self.retry_after = retry_after


class NotReadyError(Exception):
    """Report that the server is starting or stopping. Requests are answered with status 503."""


class DeadlineError(Exception):
    """Report that a job was not done in time. Requests are answered with status 504."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Say how an answer is generated.

    Attributes:
        max_tokens: maximum length of the answer, in tokens.
        temperature: 0 takes the likeliest token each time; above 0, tokens are sampled.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: makes sampling repeatable; None for another answer each time.
        stop: texts that end the answer; they are not part of it.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Hold the next piece of an answer.

    Attributes:
        text: the words, which may be none.
        num_tokens: the tokens generated so far.
        finish_reason: None until the answer is complete.
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None


# Jobs are compared by identity. Whoever submits one cancels it by its future, which frees its place within a step.
@dataclass(eq=False, kw_only=True)
class Job:
    """Hold what the model reads for a job.

    Attributes:
        branch: the tokens and images.
        image_key: a digest of the images' bytes, by which what was computed for them is found again; empty for none.
        prefix_length: the tokens up to the end of the last image, from which later jobs may continue; 0 for none.
        timeout: seconds until the job is given up.
        future: the result, set by the engine: an `EngineError` or a `DeadlineError` if there is none.
        cached_tokens: the tokens of the branch that did not have to be read again, set by the engine.
    """

    # What the model reads, and under what it is kept.
    branch: Branch
    image_key: str = ""
    prefix_length: int = 0
    # Until when, and for whom.
    timeout: float = 120.0
    future: "Future[Any]" = field(default_factory=Future)
    created: float = field(default_factory=time.monotonic)
    cached_tokens: int = 0

    @cached_property
    def prefix_key(self) -> str:
        """Return what identifies the prefix: its images and its tokens; empty if later jobs cannot continue from it."""
        # At least one token is left to continue with.
        if not 0 < self.prefix_length < len(self.branch):
            return ""
        tokens = self.branch.input_ids[: self.prefix_length].numpy().tobytes()
        return self.image_key + hashlib.sha256(tokens).hexdigest()

    @property
    def is_cancelled(self) -> bool:
        """Return whether nobody waits for the result any more."""
        # Not a flag of its own: a client that goes away cancels the future that it waits for.
        return self.future.cancelled()

    def is_late(self, now: float) -> bool:
        """Return whether it should have been done by a time of `time.monotonic`."""
        return now > self.created + self.timeout

    def resolve(self, result: Any) -> None:
        """Set the result, or the error if it is one; without effect on a job that is over."""
        # A future that is running cannot be cancelled, so nobody can come between these calls.
        if self.future.done() or not self.future.set_running_or_notify_cancel():
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


@dataclass(eq=False, kw_only=True)
class EmbedJob(Job):
    """Embed a branch. The result is its embedding, a float32 unit vector of shape (dim,)."""


@dataclass(eq=False, kw_only=True)
class ScoreJob(Job):
    """Compare next tokens of a branch. The result is their logits, float32 of shape (tokens,).

    Attributes:
        token_ids: the tokens.
    """

    token_ids: tuple[int, ...]


@dataclass(eq=False, kw_only=True)
class ChatJob(Job):
    """Continue a branch with an answer. The result is its finish reason.

    Attributes:
        sampling: how it is generated.
        on_piece: is called in the engine's thread with each piece of the answer, and must return at once.
    """

    # Not a queue: who waits may be a thread or an event loop, and each is woken in its own way.
    sampling: Sampling = Sampling()
    on_piece: Callable[[Piece], None]

    @property
    def max_length(self) -> int:
        """Return the tokens of the prompt and of the longest answer together."""
        return len(self.branch) + self.sampling.max_tokens
