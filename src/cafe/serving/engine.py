"""One thread that runs the model: it reads waiting jobs, then decodes one token for all chats, and so on.

The thread is watched. If it ends by an error, all jobs that it had are failed, and a new one begins, which answers a
known question first; while there is none, the engine is not alive.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import replace
from threading import Condition, Thread
from typing import Any, TypeVar

import numpy as np

from cafe.content import Content
from cafe.lvlm.slot_cache import count_tokens_that_fit
from cafe.model import Cafe
from cafe.serving.config import EngineConfig
from cafe.serving.jobs import DeadlineError, EngineError, Job, NotReadyError, OverloadedError
from cafe.serving.metrics import Metrics
from cafe.serving.model_runner import ModelRunner
from cafe.serving.scheduler import Scheduler

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_IDLE = 0.5  # seconds between two signs of life of a thread that has nothing to do
MAX_RESTARTS = 3  # of the thread, before it has run for `STABLE` seconds
STABLE = 60.0
MEMORY_SHARE = 0.5  # of the free memory, for the keys and values of running chats
MIN_COSINE = 0.999  # between two embeddings of the known question
_CHECK = Content.of("a dog runs on the beach")


class Engine:
    """Run jobs on one model, in a thread of its own. Its methods may be called in any thread.

    Args:
        model: the model.
        config: how it is shared.
        metrics: what is measured.
    """

    def __init__(self, model: Cafe, config: EngineConfig | None = None, metrics: Metrics | None = None) -> None:
        config = config or EngineConfig()
        if config.max_chat_tokens is None:
            config = replace(config, max_chat_tokens=count_tokens_that_fit(model.lvlm, MEMORY_SHARE))
        self.model, self.config, self.metrics = model, config, metrics or Metrics()
        self._changed = Condition()  # holds the lock of all that follows
        self._scheduler = Scheduler(self.config, self.model.packing.share_prefixes)
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        # What the thread has begun in this step.
        self._reading: list[Job] = []
        self._calling: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._is_stopping = self._is_aborting = False
        self._is_alive = False
        self._heartbeat = time.monotonic()
        self._watch: Thread | None = None
        self._runner = ModelRunner(model, self.config, self.metrics)
        # Before the thread runs, while the model is known to be as it was loaded.
        self._check_branch = model.encode_embedding(_CHECK)
        self._check_vector = model.embed_branches([self._check_branch])[0]

    def start(self) -> None:
        """Start the thread, and the one that watches it."""
        self._is_alive = True
        self._watch = Thread(target=self._run_watched, daemon=True, name="engine")
        self._watch.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Refuse new jobs, and wait until those that were taken are done; after the timeout, fail them.

        Args:
            timeout: in seconds.
        """
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._watch is None:
            return
        self._watch.join(timeout)
        with self._changed:
            self._is_aborting = True
            self._changed.notify()
        self._watch.join(timeout)

    def submit(self, job: Job) -> None:
        """Take a job, of which the future gets the result.

        Raises:
            OverloadedError: too many wait.
            NotReadyError: the engine is stopping, or its thread has ended.
        """
        with self._changed:
            self._check_open()
            self._scheduler.add(job)
            self._changed.notify()

    def run(self, function: Callable[[], Result]) -> "Future[Result]":
        """Call a function in the engine's thread, between two steps.

        Raises:
            OverloadedError: too many wait.
            NotReadyError: the engine is stopping, or its thread has ended.
        """
        future: Future[Result] = Future()
        with self._changed:
            self._check_open()
            if len(self._calls) >= self.config.max_waiting:
                raise OverloadedError(retry_after=1.0)
            self._calls.append((function, future))
            self._changed.notify()
        return future

    @property
    def is_alive(self) -> bool:
        """Return whether the thread runs."""
        return self._is_alive

    @property
    def heartbeat_age(self) -> float:
        """Return the seconds since the thread's last sign of life."""
        return time.monotonic() - self._heartbeat

    @property
    def num_waiting(self) -> int:
        """Return the number of jobs that wait."""
        return len(self._scheduler)

    @property
    def num_chats(self) -> int:
        """Return the number of chats that run."""
        return self._runner.num_chats

    def _check_open(self) -> None:
        """Make sure that jobs are taken.

        Raises:
            NotReadyError: they are not.
        """
        if self._is_stopping or not self._is_alive:
            raise NotReadyError

    def _run_watched(self) -> None:
        """Run steps until the engine is stopped, in a new thread each time that one has ended by an error."""
        num_restarts = 0
        while True:
            started = time.monotonic()
            thread = Thread(target=self._run, daemon=True, name="model")
            thread.start()
            thread.join()
            if self._is_stopping or self._is_aborting:
                self._is_alive = False
                return
            # Steps ended by an error. What the thread had was failed by itself, so that nothing is done twice.
            num_restarts = 1 if time.monotonic() - started > STABLE else num_restarts + 1
            if num_restarts > MAX_RESTARTS:
                logger.critical(
                    "The model's thread has ended %d times in a row and is not started again.", num_restarts
                )
                return
            self.metrics.engine_restarts.inc()
            self._runner = ModelRunner(self.model, self.config, self.metrics)

    def _run(self) -> None:
        """Run steps until the engine is stopped or one of them fails."""
        try:
            self._check_model()
            self._is_alive = True
            while self._step():
                pass
        except BaseException:
            logger.exception("The model's thread has ended.")
        finally:
            with self._changed:
                self._is_alive = False
                self._fail_all()

    def _step(self) -> bool:
        """Read jobs and decode a token; return whether there is another step."""
        with self._changed:
            if not self._wait_for_work():
                return False
        failures = self._runner.num_failures
        for function, future in self._calling:
            _call(function, future)
        # A step may call, read and decode, and each of them is a sign of life.
        self._heartbeat = time.monotonic()
        if self._reading:
            start = time.monotonic()
            self._runner.read(self._reading)
            self._heartbeat = time.monotonic()
            self._observe_reading(self._reading, self._heartbeat - start)
        if self._runner.num_chats:
            start = time.monotonic()
            self._runner.drop(_is_over)
            self._runner.decode()
            seconds = time.monotonic() - start
            self._scheduler.observe_decoding(seconds)
            self.metrics.model_seconds.labels(task="decode").inc(seconds)
        self.metrics.running_chats.set(self._runner.num_chats)
        # A job that fails alone is at fault itself, or the model does not work any more.
        if self._runner.num_failures > failures:
            self._check_model()
        return True

    def _wait_for_work(self) -> bool:
        """Wait for something to do, and take jobs to read and functions to call; return False if this is the end."""
        while True:
            self._heartbeat = time.monotonic()
            self._reading, self._calling = [], []
            if self._is_aborting:
                return False
            self._scheduler.drop_over(self._heartbeat)
            self._reading = self._scheduler.take(self._runner.num_chats, self._runner.longest_chat)
            # One in a step, so that chats have a token between two of them.
            self._calling = [self._calls.popleft()] if self._calls else []
            if self._reading or self._calling or self._runner.num_chats:
                return True
            if self._is_stopping:
                return False
            self._changed.wait(MAX_IDLE)
            self.metrics.idle_seconds.inc(time.monotonic() - self._heartbeat)

    def _observe_reading(self, jobs: list[Job], seconds: float) -> None:
        """Measure a step that read jobs."""
        self._scheduler.observe_reading(jobs, seconds)
        self.metrics.model_seconds.labels(task="read").inc(seconds)
        self.metrics.step_jobs.observe(len(jobs))
        self.metrics.step_tokens.observe(sum(len(job.branch) for job in jobs))
        for job in jobs:
            waited = max(time.monotonic() - seconds - job.created, 0.0)
            self.metrics.queue_seconds.labels(task=type(job).__name__.removesuffix("Job").lower()).observe(waited)

    def _check_model(self) -> None:
        """Make sure that the model still embeds a known text as it did at first.

        Raises:
            EngineError: it does not.
        """
        vector = self.model.embed_branches([self._check_branch])[0]
        if not float(np.dot(vector, self._check_vector)) >= MIN_COSINE:  # also of NaN
            raise EngineError("The model gives another embedding than before.")

    def _fail_all(self) -> None:
        """Fail all jobs that the thread had, running or waiting."""
        running = [chat.job for batch in self._runner.batches for chat in batch.chats]
        for job in [*self._reading, *running, *self._scheduler.chats, *self._scheduler.others]:
            job.resolve(EngineError("The model's thread has ended."))
        # A new one, because the error may have left this one in any state.
        self._scheduler = Scheduler(self.config, self.model.packing.share_prefixes)
        for _, future in [*self._calling, *self._calls]:
            with suppress(InvalidStateError):  # of those that are done or cancelled
                future.set_exception(EngineError("The model's thread has ended."))
        self._calls.clear()
        self._reading, self._calling = [], []


def _is_over(job: Job) -> bool:
    """Return whether a running chat is cancelled or late; the latter is failed."""
    if job.is_late(time.monotonic()):
        job.resolve(DeadlineError())
        return True
    return job.is_cancelled


def _call(function: Callable[[], Any], future: "Future[Any]") -> None:
    """Call a function, and set the result of its future."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
