"""How pieces come from the engine's thread to the event loop, without a server."""

import asyncio
import json
from threading import Thread

import pytest
import torch

from cafe.packing import Branch
from cafe.serving.jobs import ChatJob, DeadlineError, EngineError, Piece
from cafe.serving.streaming import Mailbox, chat_pieces, make_event


def make_job(mailbox):
    """A chat of one token."""
    mask = torch.zeros(1, dtype=torch.bool)
    return ChatJob(branch=Branch(torch.zeros(1, dtype=torch.long), mask, mask, {}), on_piece=mailbox.put)


def test_all_items_of_many_threads_arrive_in_the_order_of_each():
    async def receive():
        """Take items until all are there."""
        mailbox: Mailbox[tuple[int, int]] = Mailbox()
        threads = [
            Thread(target=lambda own=own: [mailbox.put((own, number)) for number in range(2000)]) for own in range(4)
        ]
        for thread in threads:
            thread.start()
        items = []
        while len(items) < 8000:
            items += await mailbox.take()
        return items

    items = asyncio.run(receive())
    for own in range(4):
        assert [number for thread, number in items if thread == own] == list(range(2000))


def test_the_loop_is_called_once_for_many_items_of_many_mailboxes(monkeypatch):
    async def receive():
        """Put items before any is taken."""
        mailboxes: list[Mailbox[int]] = [Mailbox() for _ in range(8)]
        loop, calls = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda call: (calls.append(call), wake(call)))
        for number in range(100):
            mailboxes[number % 8].put(number)
        return len(calls), [await mailbox.take() for mailbox in mailboxes]

    assert asyncio.run(receive()) == (1, [list(range(first, 100, 8)) for first in range(8)])


def test_items_for_a_loop_that_has_ended_are_dropped():
    async def make():
        """Make a mailbox."""
        return Mailbox()

    asyncio.run(make()).put(1)


def test_pieces_end_with_the_result():
    async def receive():
        """Read an answer that a thread gives."""
        mailbox: Mailbox[Piece | None] = Mailbox()
        job = make_job(mailbox)

        def answer():
            """Give an answer of three pieces."""
            for number in range(3):
                job.on_piece(Piece("abc"[number], number + 1))
            job.resolve("stop")

        Thread(target=answer).start()
        return [piece.text async for pieces in chat_pieces(job, mailbox, 30) for piece in pieces]

    assert asyncio.run(receive()) == ["a", "b", "c"]


@pytest.mark.parametrize("ending", ["error", "deadline", "closed"])
def test_pieces_that_end_early(ending):
    async def receive():
        """Read an answer that does not come to its end."""
        mailbox: Mailbox[Piece | None] = Mailbox()
        job = make_job(mailbox)
        pieces = chat_pieces(job, mailbox, -0.9 if ending == "deadline" else 30)
        job.on_piece(Piece("a", 1))
        if ending == "error":
            job.resolve(EngineError())
            with pytest.raises(EngineError):
                _ = [piece async for piece in pieces]
        elif ending == "deadline":
            with pytest.raises(DeadlineError):
                _ = [piece async for piece in pieces]
        else:
            assert [piece.text for piece in await anext(pieces)] == ["a"]
            await pieces.aclose()
        return job

    job = asyncio.run(receive())
    assert job.future.cancelled() is (ending != "error")


def test_an_event_is_one_line_whatever_a_text_holds():
    data = {"text": "one\ntwo\r\nthree\u2028four\u2029five\x85six\x0bseven é🚤"}
    event = make_event(data)
    assert event.endswith("\n\n") and len(event.splitlines()) == 2
    assert json.loads(event.removeprefix("data: ")) == data
