"""Processes that decode and process images, so that no image can end the server or hold up the model.

Each process has a thread here that gives it one job at a time. So a process that dies, or takes too long, does so
because of the job that it has: this job fails alone, and another process, which was started before, takes the place of
the dead one.
"""

import atexit
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread
from typing import Any

from PIL import Image

from cafe.content import ImageRef
from cafe.errors import RecordError
from cafe.lvlm.images import ProcessedImages
from cafe.lvlm.processing import ChatProcessor
from cafe.serving.encoding import image_key
from cafe.serving.image_worker import (
    READ_FAILED,
    Reply,
    WorkerSetup,
    decode_images,
    do_job,
    load_images,
    process_images,
)
from cafe.serving.jobs import NotReadyError, OverloadedError
from cafe.serving.lru import Lru
from cafe.serving.metrics import Metrics
from cafe.serving.worker_process import WorkerDiedError, WorkerProcess, WorkerSupply, preload
from cafe.utils.processes import dump

logger = logging.getLogger(__name__)

MAX_JOB_BYTES = 4 * 2**30  # of memory that one job may take
TOKEN_BYTES = 32  # of a number in a list
CHECK_SECONDS = 0.5  # between looks at whether an idle process is alive
CLOSE_SECONDS = 10.0  # until what cannot be ended is left alone
RETRY_AFTER = 1.0  # seconds


@dataclass(eq=False)
class _Job:
    """Hold a pickled function with its arguments, and what becomes of it."""

    data: memoryview
    future: "Future[Reply]" = field(default_factory=Future)
    created: float = field(default_factory=time.monotonic)


class ImageWorkers:
    """Read images in processes of their own. It has the methods of `FamilyImages`, and any thread may call them.

    All methods raise `OverloadedError` if too many jobs wait, `NotReadyError` once it is closed, and `RecordError` if
    the image is bad, takes too long, or ends its process.

    Args:
        chat_processor: processes images.
        num_workers: the number of processes, beside one that waits for another to die; 0 reads in this one.
        max_waiting: jobs that may wait.
        timeout: seconds that a job may take, and may wait.
        cache_bytes: memory for processed images, by the images' bytes.
        metrics: what is measured.
    """

    def __init__(
        self,
        chat_processor: ChatProcessor,
        num_workers: int = 1,
        max_waiting: int = 128,
        timeout: float = 20.0,
        cache_bytes: int = 128 * 2**20,
        metrics: Metrics | None = None,
    ) -> None:
        self.chat_processor, self.metrics = chat_processor, metrics or Metrics()
        self.num_workers, self.max_waiting, self.timeout = num_workers, max_waiting, timeout
        self._cache: Lru[Any, ProcessedImages] = Lru(cache_bytes)
        self._in_this_process = Lock()  # processors are not made for threads
        self._waiting: deque[_Job] = deque()
        self._changed = Condition()  # guards the waiting jobs and whether this is closed
        self._is_closed = False
        # By time.monotonic: when the first process was ready, and when one was seen alive last.
        self._ready_since, self._last_alive = math.inf, time.monotonic()
        self._workers: dict[int, WorkerProcess] = {}  # by the numbers of the threads
        self._threads: list[Thread] = []
        self._supply = self._start() if num_workers else None

    def load(self, refs: Sequence[ImageRef]) -> ProcessedImages:
        """Decode and process the images of one content. The same bytes give the very same object while it is kept."""
        if not refs:
            return ProcessedImages([], {})
        digest = image_key(refs)
        if not digest:
            return self._read(load_images, refs)
        key = digest, tuple(ref.limits for ref in refs)
        processed, is_hit = self._cache.get_or_make(key, lambda: self._read(load_images, refs), _num_bytes)
        self.metrics.cache_hits.labels(cache="images", hit=str(is_hit).lower()).inc()
        return processed

    def process(self, images: Sequence[Image.Image]) -> ProcessedImages:
        """Process decoded images of one content."""
        return self._read(process_images, images) if images else ProcessedImages([], {})

    def decode(self, refs: Sequence[ImageRef]) -> list[Image.Image]:
        """Decode images."""
        decoded: list[Image.Image] = self.call(decode_images, refs) if refs else []
        return decoded

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of a module with the chat processor and these arguments in a worker, and wait for it.

        Raises:
            RecordError: the function raised an error, or ended its process.
        """
        if not self.num_workers:
            with self._in_this_process:
                return _value(do_job(self.chat_processor, function, args))
        job = _Job(dump((function, args)))
        with self._changed:
            if self._is_closed:
                raise NotReadyError
            if len(self._waiting) >= self.max_waiting:
                raise OverloadedError(RETRY_AFTER)
            self._waiting.append(job)
            self._changed.notify()
        return _value(job.future.result())

    @property
    def num_alive(self) -> int:
        """Return the number of processes that can take a job, or are doing one."""
        return sum(worker.is_alive for worker in list(self._workers.values()))

    @property
    def is_alive(self) -> bool:
        """Return whether images can be read now."""
        return not self.num_workers or self.num_alive > 0

    @property
    def seconds_down(self) -> float:
        """Return for how many seconds no image could be read; 0 if one can be."""
        return 0.0 if self.is_alive else time.monotonic() - self._last_alive

    @property
    def num_waiting(self) -> int:
        """Return the number of jobs that no process has begun."""
        return len(self._waiting)

    def close(self) -> None:
        """End the processes. Jobs that are not done fail."""
        with self._changed:
            self._is_closed = True
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for job in waiting:
            job.future.set_exception(NotReadyError())
        if self._supply is not None:
            self._supply.close()
        for worker in list(self._workers.values()):
            worker.kill()
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)
        atexit.unregister(self.close)

    def _start(self) -> WorkerSupply:
        """Start the threads, which give jobs to processes, and what starts these."""
        preload(_modules(self.chat_processor))
        supply = WorkerSupply(dump(WorkerSetup(self.chat_processor, self.timeout, MAX_JOB_BYTES)), self.timeout)
        for number in range(self.num_workers):
            thread = Thread(target=self._run, args=(number, supply), daemon=True, name=f"image-worker-{number}")
            self._threads.append(thread)
            thread.start()
        # Before multiprocessing ends the processes, which would be taken for deaths.
        atexit.register(self.close)
        return supply

    def _read(self, function: Callable[..., Any], images: Sequence[Any]) -> ProcessedImages:
        """Call a function that processes images, and take the time."""
        with self.metrics.image_seconds.time():
            processed: ProcessedImages = self.call(function, images)
        return processed

    def _run(self, number: int, supply: WorkerSupply) -> None:
        """Give jobs to a process, and replace it when it dies."""
        while not self._is_closed:
            self._refuse_late()
            if self._living_worker(number, supply) is None:
                continue
            self._last_alive = time.monotonic()
            job = self._take()
            if job is not None:
                # Once more, because a process that dies while there is nothing to do is not this job's fault.
                self._do(job, self._living_worker(number, supply))
                self._last_alive = time.monotonic()  # a job that ends its process may have taken long
        if number in self._workers:
            self._workers[number].close()

    def _living_worker(self, number: int, supply: WorkerSupply) -> WorkerProcess | None:
        """Return the process of a thread, or the one that takes its place; None if there is none yet."""
        worker = self._workers.get(number)
        if worker is not None and worker.is_alive:
            return worker
        new = supply.take(CHECK_SECONDS)
        if new is None:
            return None
        if worker is not None:
            logger.warning("An image worker ended, and another takes its place.")
            self.metrics.image_worker_restarts.inc()
            worker.close()
        self._workers[number] = new
        self._ready_since = min(self._ready_since, time.monotonic())
        return new

    def _take(self) -> _Job | None:
        """Take the job that has waited the longest; None if none comes for a moment, or when this is closed."""
        with self._changed:
            if not self._waiting and not self._is_closed:
                self._changed.wait(CHECK_SECONDS)
            return self._waiting.popleft() if self._waiting else None

    def _do(self, job: _Job, worker: WorkerProcess | None) -> None:
        """Have a job done by a process."""
        if worker is None:
            job.future.set_exception(OverloadedError(RETRY_AFTER))
            return
        try:
            reply = worker.ask(job.data)
        except WorkerDiedError as error:
            job.future.set_exception(NotReadyError() if self._is_closed else RecordError(str(error)))
        except Exception:
            # Whoever sent the job waits for it, and this thread is needed for the next.
            logger.exception("A job could not be given to an image worker.")
            job.future.set_exception(RecordError(READ_FAILED))
        else:
            job.future.set_result(reply)

    def _is_late(self, job: _Job) -> bool:
        """Return whether a job has waited too long; for the first process, which starts with the server, all wait."""
        return time.monotonic() - max(job.created, self._ready_since) > self.timeout

    def _refuse_late(self) -> None:
        """Refuse the jobs that have waited too long, as where no process can be started."""
        late = []
        with self._changed:
            while self._waiting and self._is_late(self._waiting[0]):
                late.append(self._waiting.popleft())
        for job in late:
            job.future.set_exception(OverloadedError(RETRY_AFTER))


def _modules(chat_processor: ChatProcessor) -> set[str]:
    """Return the modules of the classes that a chat processor is made of, without the user's script."""
    processor = chat_processor.processor
    parts = (processor, processor.tokenizer, getattr(processor, "image_processor", None))
    return {base.__module__ for part in parts for base in type(part).__mro__} - {"__main__", "builtins"}


def _value(reply: Reply) -> Any:
    """Return what a job returned.

    Raises:
        RecordError: something is wrong with the image.
    """
    if reply.details:
        logger.error("An image could not be read:\n%s", reply.details)
    if reply.error:
        raise RecordError(reply.error)
    return reply.value


def _num_bytes(processed: ProcessedImages) -> int:
    """Return the memory that processed images take."""
    num_tokens = sum(map(len, processed.token_runs))
    return TOKEN_BYTES * num_tokens + sum(tensor.nbytes for tensor in processed.inputs.values())
