"""One thread that runs the model: it packs waiting jobs, then decodes one token for all chats."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any

from cafe.lvlm.forward import compute_logits, forward_packed
from cafe.lvlm.generation import generate_texts, generation_kwargs
from cafe.model import Cafe
from cafe.packing import pack
from cafe.serving.config import EngineConfig
from cafe.serving.jobs import ChatJob, EmbedJob, EngineError, Job, NotReadyError, OverloadedError, Piece, ScoreJob
from cafe.serving.metrics import Metrics


class Engine:
    """Run jobs on one model, in a thread of its own. (A first version: one job at a time.)"""

    def __init__(self, model: Cafe, config: EngineConfig | None = None, metrics: Metrics | None = None) -> None:
        self.model, self.config, self.metrics = model, config or EngineConfig(), metrics or Metrics()
        self._queue: Queue[Job | tuple[Callable[[], Any], Future[Any]] | None] = Queue(self.config.max_waiting)
        self._thread: Thread | None = None
        self._stopping = False
        self._heartbeat = time.monotonic()

    def start(self) -> None:
        """Start the thread."""
        self._thread = Thread(target=self._run, daemon=True, name="engine")
        self._thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Refuse new jobs, and wait until those that were taken are done."""
        self._stopping = True
        self._queue.put(None)
        if self._thread:
            self._thread.join(timeout)

    def submit(self, job: Job) -> None:
        """Take a job.

        Raises:
            OverloadedError: too many wait.
            NotReadyError: the engine is stopping, or dead.
        """
        if self._stopping or not self.is_alive:
            raise NotReadyError
        try:
            self._queue.put_nowait(job)
        except Full:
            raise OverloadedError(retry_after=1.0) from None

    def run(self, function: Callable[[], Any]) -> "Future[Any]":
        """Call a function in the engine's thread, between two steps."""
        future: Future[Any] = Future()
        self._queue.put((function, future))
        return future

    @property
    def is_alive(self) -> bool:
        """Return whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def heartbeat_age(self) -> float:
        """Return the seconds since the thread's last sign of life."""
        return time.monotonic() - self._heartbeat

    @property
    def num_waiting(self) -> int:
        """Return the number of jobs that wait."""
        return self._queue.qsize()

    def _run(self) -> None:
        while True:
            self._heartbeat = time.monotonic()
            try:
                job = self._queue.get(timeout=0.5)
            except Empty:
                continue
            if job is None:
                return
            if isinstance(job, tuple):
                function, future = job
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
                continue
            if job.future.cancelled():
                continue
            try:
                result = self._do(job)
            except Exception:
                job.future.set_exception(EngineError())
            else:
                job.future.set_result(result)

    def _do(self, job: Job) -> Any:
        match job:
            case EmbedJob():
                return self.model.embed_branches([job.branch])[0]
            case ScoreJob():
                hidden, _ = forward_packed(self.model.lvlm, pack([[job.branch]], [[]], self.model.packing))
                return compute_logits(self.model.lvlm, hidden)[0, list(job.token_ids)].numpy()
            case ChatJob():
                sampling = job.sampling
                kwargs = generation_kwargs(sampling.max_tokens, sampling.temperature, sampling.top_p)
                [text] = generate_texts(self.model.lvlm, self.model.chat_processor, [job.branch], kwargs)
                words = text.split(" ")
                for number, word in enumerate(words, 1):
                    job.on_piece(Piece(word if number == 1 else " " + word, number))
                job.on_piece(Piece("", len(words), "stop"))
                return "stop"
        raise TypeError(job)
