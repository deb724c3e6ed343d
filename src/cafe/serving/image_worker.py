"""What runs in a process that reads images: it takes a job from its pipe, does it, and sends what became of it.

A job is a function of a module with its arguments. The process may end at any job, in a decoder written in C or by the
limits that it sets itself, and whoever waits at the other end of the pipe sees that.
"""

import io
import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cafe.content import ImageRef
from cafe.errors import CafeError
from cafe.lvlm.images import ProcessedImages
from cafe.lvlm.processing import ChatProcessor
from cafe.utils.processes import dump, restore

READ_FAILED = "The image cannot be read."
TOO_MUCH_MEMORY = "Reading the image takes more memory than one image may take."


@dataclass(frozen=True)
class WorkerSetup:
    """Hold what a worker is sent first.

    Attributes:
        chat_processor: processes images.
        timeout: seconds that a job may take.
        max_bytes: memory that jobs may take, beyond what the worker has when it is ready.
    """

    chat_processor: ChatProcessor
    timeout: float
    max_bytes: int


@dataclass(frozen=True)
class Reply:
    """Hold what became of a job.

    Attributes:
        value: what the function returned.
        error: what is wrong with the image, for its sender; empty if nothing is.
        details: of a fault that should not happen, for the log.
    """

    value: Any = None
    error: str = ""
    details: str = ""


def run_worker(connection: Connection) -> None:
    """Do jobs until the pipe is closed; the first message is the `WorkerSetup`, and answered once jobs can be done."""
    # Ctrl-C reaches all processes of a terminal; the server finishes what it took, and then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The cores are the model's, and other workers'.
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):  # the other end is gone
        setup: WorkerSetup = restore(connection.recv_bytes())
        # What the model's own classes take is not counted as the jobs'.
        _warm_up(setup.chat_processor)
        _limit_memory(setup.max_bytes)
        connection.send_bytes(dump(Reply()))
        while True:
            job = connection.recv_bytes()
            with _time_limit(setup.timeout):
                reply = _reply_to(job, setup.chat_processor)
            connection.send_bytes(reply)


def do_job(chat_processor: ChatProcessor, function: Callable[..., Any], args: Sequence[Any]) -> Reply:
    """Call a function with the chat processor and its arguments."""
    try:
        return Reply(function(chat_processor, *args))
    except CafeError as error:
        return Reply(error=str(error))
    except MemoryError:  # the limit was reached; what the job had is freed
        return Reply(error=TOO_MUCH_MEMORY)
    except Exception:
        return Reply(error=READ_FAILED, details=traceback.format_exc())


def load_images(chat_processor: ChatProcessor, refs: Sequence[ImageRef]) -> ProcessedImages:
    """Decode and process the images of one content."""
    return chat_processor.images.load(refs)


def process_images(chat_processor: ChatProcessor, images: Sequence[Image.Image]) -> ProcessedImages:
    """Process decoded images of one content."""
    return chat_processor.images.process(images)


def decode_images(chat_processor: ChatProcessor, refs: Sequence[ImageRef]) -> list[Image.Image]:
    """Decode images."""
    return chat_processor.images.decode(refs)


def _reply_to(job: bytes, chat_processor: ChatProcessor) -> memoryview:
    """Do a pickled job, and pickle what became of it."""
    try:
        return dump(do_job(chat_processor, *restore(job)))
    except Exception:  # the function, its arguments or what it returned cannot be pickled
        return dump(Reply(error=READ_FAILED, details=traceback.format_exc()))


def _warm_up(chat_processor: ChatProcessor) -> None:
    """Read an image, so that the first job finds everything imported and probed."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    chat_processor.images.load([ImageRef(buffer.getvalue())])


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Have the system end this process after so many seconds, also within a decoder, or when the server is gone."""
    # Without a handler, because one of Python's would wait until the decoder returns.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory(max_bytes: int) -> None:
    """Limit the memory that this process may take beyond what it has, where the system tells that."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return
    # Addresses and not pages in memory: the system enforces no limit of those.
    num_pages = int(statm.read_text().split()[0])
    limit = num_pages * os.sysconf("SC_PAGE_SIZE") + max_bytes
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
