"""Minutes of 64 clients that embed and chat, of which one request in a hundred is poison.

Texts, images and both are embedded and chats are answered with a stream, at random; half of the images are sent for the
first time, the others again and again. Each answer is compared with the right one, which this process computed
beforehand, one at a time. Poison is a damaged image, a decompression bomb, a text that is too long, a wrong field, or a
client that hangs up; it has to be refused as it should be. Now and then clients ask for more than the queue holds,
which has to be refused with status 429 and a `Retry-After`; every other request has to be answered all the same. The
memory of all of the server's processes is measured each second.

python benchmarks/serving_load.py [--minutes 5] [--clients 64] [--threads N] [--json FILE]
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

from common import Row, show
from serving_client import Connection, encode_request
from serving_poison import Poison, cheap_poison
from serving_process import Server, sample_memory, serve
from serving_work import (
    MODEL,
    PROMPTS,
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

POOL, SIDE = 64, 256  # different inputs of each kind; pixels of an image
WEIGHTS = {"text": 40, "image": 15, "both": 10, "chat": 34, "poison": 1}  # of 100 requests
BULK_INPUTS, BULK_REQUESTS, BULK_SECONDS = 256, 4, 20.0  # as many at once, every so often
SHARE_OF_NEW = 0.5  # of the images
MAX_SHOWN = 20


@dataclass
class Pools:
    """Hold what is asked, by kind."""

    text: list[EmbeddingWork]
    image: list[EmbeddingWork]
    both: list[EmbeddingWork]
    chat: list[ChatWork]
    bulk: EmbeddingWork
    poison: list[Poison]

    def draw(self, kind: str, chance: Random) -> Any:
        """Draw a request. Half of the images have bytes of their own, which fill the server's caches and empty them."""
        work = chance.choice(getattr(self, kind))
        return renewed(work, chance.getrandbits(48)) if chance.random() < SHARE_OF_NEW else work


@dataclass
class Tally:
    """Count what became of requests, and keep the first that went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0

    def add(self, kind: str, outcome: str) -> None:
        """Count a request."""
        self.counts[f"{kind}: {outcome}"] += 1

    def add_wrong(self, kind: str, what: str) -> None:
        """Count a request that went wrong, and say why."""
        self.add(kind, "wrong")
        self.wrong.append(f"{kind}: {what[:300]}")


def make_pools(model: Cafe) -> Pools:
    """Compute the right answers, one at a time."""
    texts, images = make_texts(POOL + BULK_INPUTS), make_images(POOL, SIDE)
    chats = [([image], PROMPTS[number % 2]) for number, image in enumerate(images)]
    chats[::8] = [([images[number], images[number + 1]], "What is in both?") for number in range(0, POOL, 8)]
    return Pools(
        text=[embedding_work(model, [text]) for text in texts[:POOL]],
        image=[embedding_work(model, [image]) for image in images],
        both=[embedding_work(model, [(image, text)]) for image, text in zip(images, texts, strict=False)],
        chat=[chat_work(model, pictures, prompt) for pictures, prompt in chats],
        bulk=embedding_work(model, texts[POOL:]),
        poison=cheap_poison(images[0]),
    )


async def run_client(server: Server, pools: Pools, tally: Tally, deadline: float, chance: Random) -> None:
    """Ask until the time is over."""
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    async with connect(server) as connection:
        while time.monotonic() < deadline:
            [kind] = chance.choices(kinds, weights)
            try:
                match kind:
                    case "poison":
                        await send_poison(connection, pools, tally, chance)
                    case "chat":
                        await send_chat(connection, pools.draw(kind, chance), tally)
                    case _:
                        await send_embedding(connection, kind, pools.draw(kind, chance), tally)
            except (OSError, TimeoutError, EOFError) as error:
                connection.close()
                tally.add_wrong(kind, f"{type(error).__name__}: {error}")


async def send_embedding(connection: Connection, kind: str, work: EmbeddingWork, tally: Tally) -> None:
    """Embed, and compare."""
    response = await connection.request(work.message)
    if response.status == 429:
        await back_off(response.headers, kind, tally)
    elif response.status != 200:
        tally.add_wrong(kind, f"{response.status} {response.body[:200]!r}")
    elif not work.is_right(response):
        tally.add_wrong(kind, "other vectors")
    else:
        tally.add(kind, "right")


async def send_chat(connection: Connection, work: ChatWork, tally: Tally) -> None:
    """Chat, and compare."""
    answer = await connection.stream(work.message)
    if answer.status == 429:
        await back_off(answer.headers, "chat", tally)
    elif answer.status != 200 or answer.body:
        tally.add_wrong("chat", f"{answer.status} {answer.body[:200]!r}")
    elif not work.is_right(answer):
        tally.add_wrong("chat", f"{answer.text!r} instead of {work.expected!r}")
    else:
        tally.add("chat", "right")
        tally.tokens += answer.num_tokens


async def back_off(headers: dict[str, str], kind: str, tally: Tally) -> None:
    """Wait as a refused client should."""
    seconds = headers.get("retry-after", "")
    if not seconds.isdigit():
        tally.add_wrong(kind, f"429 with Retry-After {seconds!r}")
        return
    tally.add(kind, "429")
    await asyncio.sleep(min(float(seconds), 1.0))


async def send_poison(connection: Connection, pools: Pools, tally: Tally, chance: Random) -> None:
    """Send a request that is to be refused, or hang up during a good one."""
    if chance.random() < 0.25:
        await hang_up(connection, pools, chance)
        tally.add("poison", "hung up")
        return
    poison = chance.choice(pools.poison)
    response = await connection.request(poison.message)
    if response.status == 429:
        await back_off(response.headers, "poison", tally)
    elif response.status not in poison.statuses or poison.code not in ("", response.error_code):
        tally.add_wrong("poison", f"{poison.name}: {response.status} {response.body[:200]!r}")
    else:
        tally.add("poison", f"refused with {response.status}")


async def hang_up(connection: Connection, pools: Pools, chance: Random) -> None:
    """Close the connection amid a body, before the answer, or amid the answer."""
    message = chance.choice(pools.chat).message
    match chance.randrange(3):
        case 0:
            await connection.send(message[: len(message) // 2])
        case 1:
            await connection.send(message)
        case 2:
            await connection.stream(message, max_pieces=2)
    connection.close()


async def run_bulk(server: Server, pools: Pools, tally: Tally, deadline: float) -> None:
    """Ask for more than the queue holds, again and again."""
    connections = [connect(server) for _ in range(BULK_REQUESTS)]
    while time.monotonic() + BULK_SECONDS / 2 < deadline:
        await asyncio.gather(*(send_embedding(one, "bulk", pools.bulk, tally) for one in connections))
        await asyncio.sleep(BULK_SECONDS)
    for connection in connections:
        connection.close()


async def run_load(server: Server, pools: Pools, clients: int, seconds: float) -> Tally:
    """Let all clients ask, and say each half minute how far they are."""
    tally, deadline = Tally(), time.monotonic() + seconds
    work = [run_client(server, pools, tally, deadline, Random(number)) for number in range(clients)]
    tasks = [asyncio.create_task(one) for one in (*work, run_bulk(server, pools, tally, deadline))]
    done, pending = await asyncio.wait(tasks, timeout=30)
    while pending:
        print(f"{tally.counts.total():,} requests, {len(tally.wrong)} wrong", flush=True)
        done, pending = await asyncio.wait(tasks, timeout=30)
    for task in done:
        task.result()
    await check_end(server, tally)
    return tally


async def check_end(server: Server, tally: Tally) -> None:
    """Look whether the server is healthy and has nothing left to do."""
    async with connect(server) as connection:
        busy = True
        while busy:
            response = await connection.request(encode_request("/metrics"))
            values = dict(line.rsplit(" ", 1) for line in response.body.decode().splitlines() if line[:1] not in "#")
            gauges = [name for name in values if name.startswith(("cafe_running_chats", "cafe_queue_depth"))]
            busy = any(float(values[name]) for name in gauges)
            await asyncio.sleep(0.2)
        health = await connection.request(encode_request("/health"))
        if health.status != 200:
            tally.add_wrong("health", f"{health.status} {health.body!r}")


def main() -> None:
    """Print the counts and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, help="of PyTorch in the server")
    options, _ = parser.parse_known_args()
    pools = make_pools(Cafe.load(resolve_checkpoint(MODEL)))
    with serve(MODEL, threads=options.threads) as server, sample_memory(server, interval=1.0) as samples:
        own, began = time.process_time(), time.monotonic()
        tally = asyncio.run(run_load(server, pools, options.clients, 60 * options.minutes))
        seconds = time.monotonic() - began
        shares = (time.process_time() - own) / seconds, server.cpu_seconds() / seconds
    for name, count in sorted(tally.counts.items()):
        print(f"{name:30} {count:8,}")
    print(*tally.wrong[:MAX_SHOWN], sep="\n", file=sys.stderr)
    right = sum(count for name, count in tally.counts.items() if name.endswith("right"))
    print(f"{right / seconds:.1f} right answers/s, of which chats {tally.tokens / seconds:.1f} tokens/s")
    print(f"cores: {shares[0]:.2f} by the clients, {shares[1]:.2f} by the server")
    print(
        f"memory: {samples.resident[-1] / 2**20:,.0f} MiB at the end, {max(samples.resident) / 2**20:,.0f} at the peak"
    )
    flat = samples.mean_of_third(2) / samples.mean_of_third(1)
    refused = sum(count for name, count in tally.counts.items() if name.endswith("429"))
    show(
        f"{options.clients} clients for {options.minutes:g} minutes, with 1% poison",
        [
            Row("answers that are wrong, errors, poison that is not refused", len(tally.wrong), 0, 0, at_least=False),
            Row("requests beyond the queue that are refused with 429", refused, 1, 1),
            Row("memory, last third / middle third of the time", flat, 1.05, 1.02, at_least=False),
        ],
    )


if __name__ == "__main__":
    main()
