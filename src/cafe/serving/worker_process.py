"""Processes that read images, each with the pipe to it, and one more that waits to take the place of a dead one."""

import logging
import multiprocessing
import time
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any

from cafe.serving.image_worker import Reply, run_worker
from cafe.utils.processes import restore, without_main_module

logger = logging.getLogger(__name__)

START_SECONDS = 120.0  # a process that is not ready by then is given up
GRACE_SECONDS = 5.0  # that a process has beyond a job's time, because it ends itself when that is over
RETRY_SECONDS = 0.5  # between two attempts to start a process
# Each process is forked from one that has imported everything and has no threads. It takes milliseconds, where a new
# interpreter takes seconds, and the server itself must not be forked: it has threads that hold locks.
_CONTEXT = multiprocessing.get_context("forkserver")


class WorkerDiedError(Exception):
    """Report that a process ended before it answered, with what may be said about the image that it was reading."""


class WorkerProcess:
    """Hold a process that does one job at a time. One thread uses it, but any may look whether it is alive, or end it.

    Args:
        setup: a pickled `WorkerSetup`.
        timeout: seconds that a job may take.
    """

    def __init__(self, setup: bytes | memoryview, timeout: float) -> None:
        self._setup, self._timeout = setup, timeout
        self._process: Any = None
        self._connection: Connection | None = None
        self._is_ready = False

    @property
    def is_alive(self) -> bool:
        """Return whether the process can take a job, or is doing one."""
        return self._is_ready and self._process.is_alive()

    def start(self) -> None:
        """Start the process, and wait until it is ready.

        Raises:
            WorkerDiedError: it is not.
        """
        self._connection, other_end = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=run_worker, args=(other_end,), daemon=True, name="image-worker")
        try:
            with other_end, without_main_module():
                self._process.start()
            self._ask(self._setup, START_SECONDS)
        except Exception as error:  # there are too many processes, or the one they are forked from is gone
            self.close()
            raise WorkerDiedError("No process can be started.") from error
        self._is_ready = True

    def ask(self, job: bytes | memoryview) -> Reply:
        """Have a job done, and wait for it.

        Args:
            job: a pickled function, and its arguments.

        Raises:
            WorkerDiedError: the process ended, or was ended because the job took too long. It does no more jobs.
        """
        return self._ask(job, self._timeout + GRACE_SECONDS)

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._is_ready = False
        if self._process is not None and self._process.pid is not None:
            self._process.kill()

    def close(self) -> None:
        """End the process, and wait until it has."""
        self.kill()
        if self._process is not None and self._process.pid is not None:
            self._process.join(GRACE_SECONDS)
        if self._connection is not None:
            self._connection.close()

    def _ask(self, message: bytes | memoryview, seconds: float) -> Reply:
        """Send a message, and return the answer.

        Raises:
            WorkerDiedError: the process ended, or did not answer for so many seconds.
        """
        assert self._connection is not None
        begin = time.monotonic()
        with suppress(Exception):  # the process ended, or what it sent cannot be read
            self._connection.send_bytes(message)
            if self._connection.poll(seconds):
                reply: Reply = restore(self._connection.recv_bytes())
                return reply
        self.close()
        if time.monotonic() - begin >= self._timeout:
            raise WorkerDiedError("The image takes too long to read.")
        raise WorkerDiedError("The image ended the process that read it.")


class WorkerSupply:
    """Start processes ahead of their need, in a thread: one is ready, or soon will be.

    A new process has to read the model's tokenizer, which may take seconds.

    Args:
        setup: a pickled `WorkerSetup`.
        timeout: seconds that a job may take.
    """

    def __init__(self, setup: bytes | memoryview, timeout: float) -> None:
        self._setup, self._timeout = setup, timeout
        self._spare: Queue[WorkerProcess] = Queue(maxsize=1)
        self._closing = Event()
        self._thread = Thread(target=self._run, daemon=True, name="image-worker-supply")
        self._thread.start()

    def take(self, seconds: float) -> WorkerProcess | None:
        """Take a process that can do jobs; None if there is none within so many seconds."""
        with suppress(Empty):
            worker = self._spare.get(timeout=seconds)
            if worker.is_alive:
                return worker
            worker.close()
        return None

    def close(self) -> None:
        """End the process that is ready, and start no other."""
        self._closing.set()
        self._drop_spare()
        self._thread.join(GRACE_SECONDS)
        self._drop_spare()  # the thread may have been about to add one

    def _run(self) -> None:
        """Start one process after the other, each when the last was taken."""
        while not self._closing.is_set():
            worker = WorkerProcess(self._setup, self._timeout)
            try:
                worker.start()
            except WorkerDiedError as error:
                logger.error("An image worker cannot be started.", exc_info=error)
                self._closing.wait(RETRY_SECONDS)
            else:
                self._spare.put(worker)

    def _drop_spare(self) -> None:
        """End the process that is ready, if one is."""
        with suppress(Empty):
            self._spare.get_nowait().close()


def preload(modules: Iterable[str]) -> None:
    """Have modules imported once, in the process from which the others are forked.

    If that runs already, as where a program uses it for something else, each process imports them itself.
    """
    _CONTEXT.set_forkserver_preload([run_worker.__module__, *modules])
