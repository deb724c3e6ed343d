"""How much a server gains by answering many at once, and what its readers feel of that.

Embeddings/s of 64 clients, of queries, captions and images, and tokens/s of 16 chats about images, beside the same
server with one request at a time. The time between two tokens of 8 chats while other clients embed images, beside that
without them. The time to the first token of a question about an image that was embedded just before, beside that about
an image that is new. Every answer is compared with the right one. No image is embedded or asked about twice, other than
for that last figure, so no cache helps; those of the chats differ in their bytes alone. What is compared is measured in
turns.

python benchmarks/serving_speed.py [--repetitions 5] [--threads N] [--json FILE]
                                   [--only queries,captions,images,chats,gaps,first]
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from common import Row, show
from serving_client import Connection, Stream
from serving_process import Server, serve
from serving_work import (
    LONG_PROMPT,
    MODEL,
    ChatWork,
    EmbeddingWork,
    chat_body,
    chat_work,
    connect,
    embedding_body,
    embedding_work,
    make_images,
    make_queries,
    make_texts,
    with_comment,
)

from cafe import Cafe
from cafe.checkpoint import resolve_checkpoint

EMBEDDING_CLIENTS, CHAT_CLIENTS = 64, 16
TEXTS, IMAGES, CHATS = 1024, 512, 64  # requests of one measurement; one at a time, an eighth or a quarter of them
SIDE, PHOTO_SIDE = 256, 1024  # pixels of images, and of those asked about that were just embedded
READERS, EMBEDDERS, SECONDS = 8, 16, 15.0  # chats, clients that embed images meanwhile, and for how long
QUESTIONS = 24  # about images that were just embedded, and about new ones, of one measurement
MIN_TOKENS = 20  # of an answer whose tokens are timed


@dataclass
class Pool:
    """Hold what is asked.

    Attributes:
        model: gives the right answers.
        queries, captions: texts of a few words, and of a sentence or several.
        chats: images with the right answers about them, which are sent in other bytes each time.
    """

    model: Cafe
    queries: list[EmbeddingWork]
    captions: list[EmbeddingWork]
    chats: list[tuple[bytes, str]]

    def __post_init__(self) -> None:
        self._numbers = count(1)

    def embeddings(self, amount: int) -> list[EmbeddingWork]:
        """Return requests to embed images that are new."""
        images = make_images(amount, SIDE, next(self._numbers))
        vectors = self.model.embed(images)
        pairs = zip(images, vectors, strict=True)
        return [EmbeddingWork(embedding_body([image]), vector[None]) for image, vector in pairs]

    def dialogues(self, amount: int) -> list[ChatWork]:
        """Return chats about images whose bytes are new."""
        works = []
        for number in range(amount):
            image, expected = self.chats[number % len(self.chats)]
            works.append(ChatWork(chat_body([with_comment(image, next(self._numbers))], LONG_PROMPT), expected))
        return works

    def photos(self, amount: int) -> list[tuple[bytes, ChatWork]]:
        """Return large images that are new, each with a chat about it."""
        images = make_images(amount, PHOTO_SIDE, next(self._numbers))
        return [(image, chat_work(self.model, [image], LONG_PROMPT)) for image in images]


def make_pool(model: Cafe) -> Pool:
    """Compute the right answers, one at a time."""
    chats = [(image, chat_work(model, [image], LONG_PROMPT).expected) for image in make_images(96, SIDE)]
    tokenizer = model.chat_processor.tokenizer
    return Pool(
        model=model,
        queries=[embedding_work(model, [text]) for text in make_queries(TEXTS)],
        captions=[embedding_work(model, [text]) for text in make_texts(TEXTS)],
        chats=[(image, answer) for image, answer in chats if len(tokenizer(answer)["input_ids"]) >= MIN_TOKENS],
    )


async def share_out(server: Server, works: Sequence[Any], clients: int, ask: Callable[..., Any]) -> list[Any]:
    """Let clients ask until no work is left, and return the answers in any order.

    Args:
        server: is asked.
        works: are asked once each.
        clients: each with a connection of its own.
        ask: a coroutine function of a connection and a work.
    """
    left, answers = iter(works), []

    async def run_client(connection: Connection) -> None:
        """Ask for one after the other."""
        async with connection:
            for work in left:
                answers.append(await ask(connection, work))

    await asyncio.gather(*(run_client(connect(server)) for _ in range(clients)))
    return answers


async def embed(connection: Connection, work: EmbeddingWork) -> None:
    """Embed, and compare.

    Raises:
        AssertionError: the answer is wrong.
    """
    response = await connection.request(work.message)
    assert response.status == 200, response
    assert work.is_right(response), "other vectors"


async def chat(connection: Connection, work: ChatWork) -> Stream:
    """Chat, and compare.

    Raises:
        AssertionError: the answer is wrong.
    """
    answer = await connection.stream(work.message)
    assert answer.status == 200 and not answer.body, answer
    assert work.is_right(answer), f"{answer.text!r} instead of {work.expected!r}"
    return answer


def timed(server: Server, works: Sequence[Any], clients: int, ask: Callable[..., Any]) -> tuple[float, list[Any]]:
    """Return the seconds that some work takes, and the answers. Bytes are made before."""
    assert all(work.message for work in works)
    started = time.perf_counter()
    answers = asyncio.run(share_out(server, works, clients, ask))
    return time.perf_counter() - started, answers


def embedding_ratio(server: Server, make: Callable[[int], list[EmbeddingWork]], amount: int, name: str) -> float:
    """Return embeddings/s of many clients over those of one."""
    alone, _ = timed(server, make(amount // 8), 1, embed)
    works = make(amount)
    own = time.process_time()
    together, _ = timed(server, works, EMBEDDING_CLIENTS, embed)
    share = (time.process_time() - own) / together
    print(
        f"{name}/s: {amount / together:.1f} of {EMBEDDING_CLIENTS} clients, which take {share:.2f} cores, "
        f"{amount // 8 / alone:.1f} one at a time",
        flush=True,
    )
    return (amount / together) / (amount // 8 / alone)


def chat_ratio(server: Server, pool: Pool) -> float:
    """Return tokens/s of many chats over those of one at a time."""
    rates = []
    for clients, amount in ((1, CHATS // 4), (CHAT_CLIENTS, CHATS)):
        seconds, answers = timed(server, pool.dialogues(amount), clients, chat)
        rates.append(sum(answer.num_tokens for answer in answers) / seconds)
    print(f"tokens/s: {rates[1]:.1f} of {CHAT_CLIENTS} chats, {rates[0]:.1f} one at a time", flush=True)
    return rates[1] / rates[0]


async def read_chats(
    server: Server, dialogues: Iterator[ChatWork], embeddings: Iterator[EmbeddingWork], embedders: int
) -> tuple[list[float], float]:
    """Return the seconds between tokens of chats for some time, and the images/s that others embed meanwhile."""
    deadline, embedded = time.monotonic() + SECONDS, 0
    gaps: list[float] = []

    async def read() -> None:
        """Read one answer after the other."""
        async with connect(server) as connection:
            while time.monotonic() < deadline:
                gaps.extend((await chat(connection, next(dialogues))).gaps)

    async def embed_images() -> None:
        """Embed one image after the other."""
        nonlocal embedded
        async with connect(server) as connection:
            while time.monotonic() < deadline:
                await embed(connection, next(embeddings))
                embedded += 1

    await asyncio.gather(*(read() for _ in range(READERS)), *(embed_images() for _ in range(embedders)))
    return gaps, embedded / SECONDS


def gap_ratio(server: Server, pool: Pool) -> float:
    """Return the 95th percentile of the time between tokens while images are embedded, over that without."""
    tails = []
    for embedders in (0, EMBEDDERS):
        dialogues, embeddings = iter(pool.dialogues(2048)), iter(pool.embeddings(2048 if embedders else 0))
        own = time.process_time()
        gaps, rate = asyncio.run(read_chats(server, dialogues, embeddings, embedders))
        share = (time.process_time() - own) / SECONDS
        middle, tail, end = (1000 * np.percentile(gaps, each) for each in (50, 95, 99))
        print(
            f"ms between tokens of {READERS} chats, {rate:.1f} images/s embedded meanwhile: p50 {middle:.1f}, "
            f"p95 {tail:.1f}, p99 {end:.1f}; the clients take {share:.2f} cores",
            flush=True,
        )
        tails.append(tail)
    return tails[1] / tails[0]


async def time_first_tokens(server: Server, pool: Pool) -> tuple[list[float], list[float]]:
    """Return the seconds to the first token about images that were just embedded, and about new ones, in turns."""
    known, new = [], []
    photos = pool.photos(2 * QUESTIONS)
    async with connect(server) as connection:
        for (image, question), (_, other_question) in zip(photos[::2], photos[1::2], strict=True):
            response = await connection.request(EmbeddingWork(embedding_body([image]), np.zeros((1, 1))).message)
            assert response.status == 200
            for work, seconds in ((question, known), (other_question, new)):
                seconds.append((await chat(connection, work)).first)
    return known, new


def first_ratio(server: Server, pool: Pool) -> float:
    """Return the time to the first token about an image that was just embedded, over that about a new one."""
    known, new = (statistics.median(seconds) for seconds in asyncio.run(time_first_tokens(server, pool)))
    print(f"ms to the first token: {1000 * known:.1f} about an image just embedded, {1000 * new:.1f} about a new one")
    return known / new


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of PyTorch in the server")
    parser.add_argument("--only", default="queries,captions,images,chats,gaps,first", help="some of these")
    options, _ = parser.parse_known_args()
    pool = make_pool(Cafe.load(resolve_checkpoint(MODEL)))
    clients, chats, readers = f"{EMBEDDING_CLIENTS} clients", f"{CHAT_CLIENTS} chats", f"{READERS} chats"
    figures: list[tuple[str, Callable[[Server], float], Row]] = [
        (
            "queries",
            lambda server: embedding_ratio(server, lambda amount: pool.queries[:amount], TEXTS, "queries"),
            Row(f"embeddings/s of queries, {clients} / one request at a time", 0, 3, 5),
        ),
        (
            "captions",
            lambda server: embedding_ratio(server, lambda amount: pool.captions[:amount], TEXTS, "captions"),
            Row(f"embeddings/s of captions, {clients} / one request at a time", 0, 3, 5),
        ),
        (
            "images",
            lambda server: embedding_ratio(server, pool.embeddings, IMAGES, "images"),
            Row(f"embeddings/s of images, {clients} / one request at a time", 0, 3, 5),
        ),
        ("chats", lambda server: chat_ratio(server, pool), Row(f"tokens/s, {chats} / one at a time", 0, 3, 6)),
        (
            "gaps",
            lambda server: gap_ratio(server, pool),
            Row(f"p95 of the time between tokens of {readers}, images embedded / not", 0, 2, 1.5, at_least=False),
        ),
        (
            "first",
            lambda server: first_ratio(server, pool),
            Row("time to the first token, an image just embedded / a new one", 0, 0.6, 0.3, at_least=False),
        ),
    ]
    rows = []
    with serve(MODEL, threads=options.threads) as server:
        for name, measure, row in figures:
            if name not in options.only.split(","):
                continue
            measure(server)  # what is made once is made
            rows.append(replace(row, value=statistics.median(measure(server) for _ in range(options.repetitions))))
    show("Many requests at once", rows)


if __name__ == "__main__":
    main()
