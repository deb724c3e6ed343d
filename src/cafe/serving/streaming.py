"""From the engine's thread to the event loop: pieces of answers, results, and clients that have gone."""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, ref

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cafe.serving.envelope import CLIENT_GONE
from cafe.serving.jobs import ChatJob, DeadlineError, Job, Piece
from cafe.serving.services import Services, services_of

Item = TypeVar("Item")

GRACE = 1.0  # seconds past its deadline for which a job is waited for; the engine gives it up itself


class LoopCalls:
    """Call functions in an event loop from other threads. The loop is woken once for all calls that came meanwhile.

    A step of the engine has something for many requests. Each call into the loop is one to the system, at which the
    loop's thread would take the interpreter from the engine's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._calls: deque[Callable[[], object]] = deque()
        self._is_woken = False

    def add(self, call: Callable[[], object]) -> None:
        """Have a function called, in any thread."""
        self._calls.append(call)
        # The order matters: a call that is added before the flag is cleared is made after it.
        loop = self._loop()
        if loop is not None and not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        """Make all calls, in the loop."""
        self._is_woken = False
        while self._calls:
            self._calls.popleft()()


# Of each loop that runs; a server has one.
_LOOP_CALLS: WeakKeyDictionary[asyncio.AbstractEventLoop, LoopCalls] = WeakKeyDictionary()


class Mailbox(Generic[Item]):
    """Pass items from any thread to a coroutine, which is woken once for all that came meanwhile.

    To be made in the event loop.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._loop_calls = _LOOP_CALLS.setdefault(loop, LoopCalls(loop))
        self._items: deque[Item] = deque()
        self._event = asyncio.Event()
        self._is_woken = False

    def put(self, item: Item) -> None:
        """Add an item, in any thread."""
        self._items.append(item)
        # As above: an item that is added before the flag is cleared is taken after it.
        if not self._is_woken:
            self._is_woken = True
            self._loop_calls.add(self._event.set)

    async def take(self) -> list[Item]:
        """Wait for items, and return all that are there."""
        await self._event.wait()
        self._event.clear()
        self._is_woken = False
        items: list[Item] = []
        while self._items:
            items.append(self._items.popleft())
        return items


def submit_all(services: Services, jobs: Sequence[Job]) -> None:
    """Have the engine take all jobs of a request, or none.

    Raises:
        OverloadedError: too many wait.
        NotReadyError: the engine takes none.
    """
    try:
        for job in jobs:
            services.engine.submit(job)
    except Exception:
        cancel_all(jobs)
        raise


def cancel_all(jobs: Sequence[Job]) -> None:
    """Cancel the jobs that are not done."""
    for job in jobs:
        job.future.cancel()


async def run_jobs(services: Services, jobs: Sequence[Job]) -> list[Any]:
    """Have the engine do all jobs of a request, and return their results.

    Raises:
        OverloadedError, NotReadyError: the engine does not take them.
        EngineError, DeadlineError: one cannot be done. The others are cancelled.
    """
    mailbox: Mailbox[Job] = Mailbox()
    for job in jobs:
        job.future.add_done_callback(lambda _, job=job: mailbox.put(job))  # type: ignore[misc]
    submit_all(services, jobs)
    try:
        num_done = 0
        while num_done < len(jobs):
            for job in await mailbox.take():
                job.future.result()  # the first that fails ends the request
                num_done += 1
        return [job.future.result() for job in jobs]
    finally:
        cancel_all(jobs)


async def chat_pieces(job: ChatJob, mailbox: Mailbox[Piece | None], timeout: float) -> AsyncIterator[list[Piece]]:
    """Yield the pieces of an answer as they come, several at once if they came together.

    Args:
        job: was submitted, and puts its pieces into the mailbox.
        mailbox: of the job.
        timeout: seconds after which the answer is given up.

    Raises:
        EngineError, DeadlineError: the answer ends before it is complete.
    """
    job.future.add_done_callback(lambda future: mailbox.put(None))
    end = asyncio.get_running_loop().time() + timeout + GRACE
    try:
        while True:
            # Not around the `yield` too: a timeout would end whatever the receiver is doing then.
            async with asyncio.timeout_at(end):
                items = await mailbox.take()
            if pieces := [item for item in items if item is not None]:
                yield pieces
            if None in items:
                job.future.result()
                return
    except TimeoutError:
        raise DeadlineError from None
    finally:
        job.future.cancel()  # of a client that has gone, if it is not done


class EventStream(StreamingResponse):
    """Stream an answer as server-sent events, and cancel its job if the client goes away, even before it begins."""

    def __init__(self, events: AsyncIterator[str], job: ChatJob | None) -> None:
        # A proxy that collects a stream before it passes it on makes none of it.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self.job:
                self.job.future.cancel()


def make_event(data: dict[str, Any]) -> str:
    """Return a server-sent event with a JSON object."""
    # In ASCII: many clients split a stream at any of Unicode's line ends, which JSON may hold as they are.
    return f"data: {json.dumps(data)}\n\n"


async def while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Do what a request asks for, unless its client goes away or it takes too long: then the work is cancelled.

    Raises:
        DeadlineError: it takes too long.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(request))
    timeout = services_of(request).config.limits.timeout + GRACE
    try:
        await asyncio.wait([task, watch], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watch.done():
            return Response(status_code=CLIENT_GONE)
        raise DeadlineError  # images waited to be decoded, or the engine does not answer
    finally:
        for each in (task, watch):
            each.cancel()


async def _disconnected(request: Request) -> None:
    """Wait until the client has gone; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
