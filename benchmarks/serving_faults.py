"""What ended or held up other servers, one after the other, each followed by good requests.

The server has to refuse each as it should, without the text of an exception or a path, and then answer a good request
for an embedding and a good chat right within a second. A listener on this machine counts who downloads an image from
it: nobody may. The faults are those of published reports: damaged and huge images, placeholder tokens in a text,
addresses of images, bodies that are too large, too slow or without an end, wrong fields, clients that hang up, and at
last an image worker that is killed.

python benchmarks/serving_faults.py [--threads N] [--json FILE]
"""

import argparse
import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import psutil
from common import Row, show
from serving_client import Response, encode_request
from serving_poison import Poison, bad_bodies, bad_fields, bad_images, foreign_addresses, placeholder_texts
from serving_process import Server, serve
from serving_work import (
    LONG_PROMPT,
    MODEL,
    ChatWork,
    EmbeddingWork,
    chat_work,
    connect,
    embedding_work,
    make_images,
    make_texts,
    renewed,
)

from cafe import Cafe
from cafe.checkpoint import resolve_checkpoint

SECONDS = 1.0  # within which a good request is answered
# What the text of an exception or a path would look like.
LEAK = re.compile(
    rb"Traceback|File \"|0x[0-9a-f]{6}|/(usr|home|root|tmp|etc|var|proc)/|site-packages|\.py\b|PIL\.|torch\."
)
SLOW_BODY_SECONDS = 40.0  # until a body that stops coming is given up
SECONDS_TO_RESTART = 60.0  # within which a worker that was killed is replaced


@dataclass(frozen=True)
class Good:
    """Hold an image, and good requests with their right answers."""

    image: bytes
    text: EmbeddingWork
    vector: EmbeddingWork
    chat: ChatWork

    def renewed(self, number: int) -> "Good":
        """Return the same with other bytes of the same image, so that no cache answers."""
        return Good(self.image, self.text, renewed(self.vector, number), renewed(self.chat, number))


@dataclass
class Findings:
    """Collect what went wrong, and how long good requests took.

    Attributes:
        faults: how many were tried.
        wrong: a line for each thing that was not as it should be.
        seconds: of all good requests together after each fault.
    """

    faults: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


Act = Callable[[Server, Good], Awaitable[str]]  # returns what went wrong; empty for nothing


async def check_good(server: Server, good: Good, after: str, findings: Findings) -> None:
    """Ask for embeddings of a text and an image and for a chat at once, and for the health."""
    started = time.perf_counter()
    connections = [connect(server) for _ in range(3)]
    text, vector, chat = await asyncio.gather(
        connections[0].request(good.text.message),
        connections[1].request(good.vector.message),
        connections[2].stream(good.chat.message),
    )
    seconds = time.perf_counter() - started
    health = await connections[0].request(encode_request("/health"))
    for connection in connections:
        connection.close()
    findings.seconds.append(seconds)
    right = text.status == vector.status == chat.status == 200
    if not (right and good.text.is_right(text) and good.vector.is_right(vector) and good.chat.is_right(chat)):
        findings.wrong.append(f"after {after}: {text.status}, {vector.status}, {chat.status}, {chat.text!r}")
    if seconds > SECONDS:
        findings.wrong.append(f"after {after}: {seconds:.2f} s until good requests were answered")
    if health.status != 200:
        findings.wrong.append(f"after {after}: the health is {health.status}")


def check_refusal(poison: Poison, response: Response) -> str:
    """Say what is wrong with the response to poison; empty for nothing."""
    if response.status not in poison.statuses:
        return f"{response.status} instead of {poison.statuses}: {response.body[:200]!r}"
    if poison.code not in ("", response.error_code):
        return f"the code {response.error_code} instead of {poison.code}"
    if response.status >= 400:
        if not response.error_code:
            return f"no error object: {response.body[:200]!r}"
        if leak := LEAK.search(response.body):
            return f"the answer says {leak[0]!r}"
        if "x-request-id" not in response.headers:
            return "no X-Request-Id"
    return ""


async def send(poison: Poison, server: Server, good: Good) -> str:
    """Send poison. The server may answer and close the connection before it has read all of it."""
    async with connect(server) as connection:
        reading = asyncio.create_task(connection.send(poison.message))
        with suppress(OSError):
            await reading
        return check_refusal(poison, await connection.read())


async def send_endless(chunked: bool, server: Server, good: Good) -> str:
    """Send a body without an end, in chunks, or one whose length is said to be 10 GB."""
    length = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(10**10)}
    head = encode_request("/v1/embeddings", b"", length)
    if chunked:
        head = head.replace(b"Content-Length: 0\r\n", b"")
    part = b"a" * 2**16
    async with connect(server) as connection:
        await connection.send(head)
        reading = asyncio.create_task(connection.read())
        sent = 0
        with suppress(OSError):
            while not reading.done() and sent < 2**28:
                await connection.send(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
                sent += len(part)
                await asyncio.sleep(0)
        response = await reading
    return check_refusal(Poison("", "", b"", (413,)), response)


async def send_slowly(server: Server, good: Good) -> str:
    """Send half a body, and then nothing; meanwhile others are answered."""
    findings = Findings()
    async with connect(server) as connection:
        await connection.send(good.text.message[:-5])
        await check_good(server, good, "half a body", findings)
        try:
            async with asyncio.timeout(SLOW_BODY_SECONDS):
                response = await connection.read()
        except TimeoutError:
            return f"after {SLOW_BODY_SECONDS:g} s it is still waited for"
    return "; ".join([*findings.wrong, check_refusal(Poison("", "", b"", (408,)), response)]).strip("; ")


async def send_headers_slowly(server: Server, good: Good) -> str:
    """Open many connections that never send all of their headers."""
    connections = [connect(server) for _ in range(100)]
    for connection in connections:
        await connection.send(b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\n")
    findings = Findings()
    await check_good(server, good, "", findings)
    for connection in connections:
        connection.close()
    return "; ".join(findings.wrong)


async def hang_up(pieces: int, server: Server, good: Good) -> str:
    """Hang up while a hundred answers are computed, or after some pieces of each."""
    connections = [connect(server) for _ in range(100)]
    if pieces:
        await asyncio.gather(*(connection.stream(good.chat.message, pieces) for connection in connections[:20]))
    else:
        for connection in connections:
            await connection.send(good.vector.message)
    for connection in connections:
        connection.close()
    return ""


async def check_placeholders(works: list[EmbeddingWork | ChatWork], server: Server, good: Good) -> str:
    """Send texts with placeholder tokens, which are answered as any others."""
    async with connect(server) as connection:
        for work in works:
            if isinstance(work, ChatWork):
                answer = await connection.stream(work.message)
                if not work.is_right(answer):
                    return f"{answer.status} {answer.text!r} {answer.body[:200]!r} instead of {work.expected!r}"
            else:
                response = await connection.request(work.message)
                if response.status != 200 or not work.is_right(response):
                    return f"{response.status} {response.body[:200]!r}"
    return ""


async def kill_worker(server: Server, good: Good) -> str:
    """Kill the processes that read images, and wait until images are read again."""
    for child in psutil.Process(server.pid).children(recursive=True):
        # The helpers of multiprocessing have no part in it: the tracker, and the process that starts others.
        if "resource_tracker" not in " ".join(child.cmdline()) and not child.children():
            os.kill(child.pid, signal.SIGKILL)
    started, statuses = time.perf_counter(), list[int]()
    async with connect(server) as connection:
        while time.perf_counter() - started < SECONDS_TO_RESTART:
            response = await connection.request(good.vector.message)
            statuses.append(response.status)
            if response.status == 200:
                print(f"images are read again {time.perf_counter() - started:.2f} s after their workers were killed")
                return "" if good.vector.is_right(response) else "other vectors"
            await asyncio.sleep(0.1)
    return f"no image is read any more: {statuses}"


def all_faults(good: Good, works: list[EmbeddingWork | ChatWork], trap: int) -> dict[str, Act]:
    """Return what is tried, by its name, in its order."""
    poisons = [*bad_images(good.image), *foreign_addresses(trap), *bad_fields(), *bad_bodies()]
    return {
        **{poison.name: partial(send, poison) for poison in poisons},
        "placeholder tokens in texts": partial(check_placeholders, works),
        "a body without an end": partial(send_endless, True),
        "a body of 10 GB": partial(send_endless, False),
        "a hundred clients that never send their headers": send_headers_slowly,
        "a hundred clients that hang up before the answer": partial(hang_up, 0),
        "twenty clients that hang up amid the answer": partial(hang_up, 2),
        "a body that stops coming": send_slowly,
        "an image worker that is killed": kill_worker,
    }


async def run(server: Server, good: Good, works: list[EmbeddingWork | ChatWork]) -> Findings:
    """Try everything, and print a line for each."""
    findings, visitors = Findings(), list[str]()

    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Count who comes."""
        visitors.append(repr(await reader.read(200)))
        writer.close()

    trap = await asyncio.start_server(welcome, "127.0.0.1", 0)
    # The first answers come after what is made once, so only their words count.
    start = Findings()
    await check_good(server, good.renewed(0), "the start", start)
    print(f"first answers {start.seconds[0]:.2f} s after the start")
    for number, (name, act) in enumerate(all_faults(good, works, trap.sockets[0].getsockname()[1]).items(), 1):
        try:
            problem = await act(server, good.renewed(2 * number))
        except (OSError, EOFError, TimeoutError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            findings.wrong.append(f"{name}: {problem}")
        await check_good(server, good.renewed(2 * number + 1), name, findings)
        print(
            f"{name[:70]:70} {'as it should' if not problem else 'WRONG'}, then {findings.seconds[-1]:.2f} s",
            flush=True,
        )
        findings.faults += 1
    findings.wrong += [f"an image was downloaded: {visitor}" for visitor in visitors]
    trap.close()
    return findings


def main() -> None:
    """Print a line for each fault, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="of PyTorch in the server")
    options, _ = parser.parse_known_args()
    model = Cafe.load(resolve_checkpoint(MODEL))
    image, [text] = make_images(1, 256)[0], make_texts(1)
    vector, chat = embedding_work(model, [image]), chat_work(model, [image], LONG_PROMPT)
    good = Good(image, embedding_work(model, [text]), vector, chat)
    tokens = (*model.chat_processor.tokenizer.all_special_tokens, "<image>", "<|im_end|>")
    works: list[EmbeddingWork | ChatWork] = []
    for text in placeholder_texts(tokens):
        works += [embedding_work(model, [text]), chat_work(model, [], text), chat_work(model, [image], text)]
    with serve(MODEL, threads=options.threads) as server:
        findings = asyncio.run(run(server, good, works))
    print(*findings.wrong, sep="\n", file=sys.stderr)
    show(
        f"{findings.faults} faults, each followed by good requests",
        [
            Row("faults tried", findings.faults, 60, 60),
            Row("answers that are not as they should be", len(findings.wrong), 0, 0, at_least=False),
            Row(
                "seconds until good requests are answered, the longest",
                max(findings.seconds),
                SECONDS,
                0.3,
                at_least=False,
            ),
        ],
    )


if __name__ == "__main__":
    main()
