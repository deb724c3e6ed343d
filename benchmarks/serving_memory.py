"""The memory of one server that embeds and chats, beside two servers of which each does one.

The same clients do the same work in the same time: 32 embed images and 16 chat about images, from one server or from
two. What is compared is the peak of the memory of all processes, in which what processes share, such as the code of
libraries, is divided between them (PSS); the peak of the resident memory (RSS) is printed as well.

python benchmarks/serving_memory.py [--seconds 30] [--model CHECKPOINT] [--threads N] [--json FILE]
"""

import argparse
import asyncio
import time
from itertools import count

from common import Row, show
from serving_client import encode_request
from serving_process import MemorySamples, Server, sample_memory, serve
from serving_work import LONG_PROMPT, MODEL, chat_body, connect, embedding_body, make_images, with_comment

EMBEDDERS, CHATS, SIDE = 32, 16, 512
INTERVAL = 0.05  # seconds between two measurements


async def use(embedding: Server, chatting: Server, seconds: float) -> tuple[int, int]:
    """Embed images with one server and chat about others with one, and return how many of each were done."""
    images, numbers, deadline = make_images(32, SIDE), count(), time.monotonic() + seconds
    done = {"embeddings": 0, "chats": 0}

    async def embed() -> None:
        """Embed one image after the other."""
        async with connect(embedding) as connection:
            while time.monotonic() < deadline:
                number = next(numbers)
                body = embedding_body([with_comment(images[number % len(images)], number)])
                response = await connection.request(encode_request("/v1/embeddings", body))
                assert response.status == 200, response
                done["embeddings"] += 1

    async def chat() -> None:
        """Chat about one image after the other."""
        async with connect(chatting) as connection:
            while time.monotonic() < deadline:
                number = next(numbers)
                body = chat_body([with_comment(images[number % len(images)], number)], LONG_PROMPT)
                answer = await connection.stream(encode_request("/v1/chat/completions", body))
                assert answer.status == 200 and answer.finished, answer
                done["chats"] += 1

    await asyncio.gather(*(embed() for _ in range(EMBEDDERS)), *(chat() for _ in range(CHATS)))
    return done["embeddings"], done["chats"]


def report(name: str, samples: MemorySamples, done: tuple[int, int]) -> int:
    """Print the peaks, and return that of the memory with what is shared divided."""
    shared, resident = max(samples.shared), max(samples.resident)
    print(
        f"{name}: {shared / 2**20:,.0f} MiB at the peak ({resident / 2**20:,.0f} resident), "
        f"{done[0]} images embedded, {done[1]} chats",
        flush=True,
    )
    return shared


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--threads", type=int, help="of PyTorch in each server")
    options, _ = parser.parse_known_args()
    with serve(options.model, threads=options.threads) as server, sample_memory(server, interval=INTERVAL) as samples:
        done = asyncio.run(use(server, server, options.seconds))
    one = report("one server for both", samples, done)
    with (
        serve(options.model, threads=options.threads) as embedding,
        serve(options.model, threads=options.threads) as chatting,
        sample_memory(embedding, chatting, interval=INTERVAL) as samples,
    ):
        done = asyncio.run(use(embedding, chatting, options.seconds))
    two = report("two servers for one each", samples, done)
    show(
        "The memory of one server for both",
        [Row("peak memory, one server for both / two for one each", one / two, 0.6, 0.52, at_least=False)],
    )


if __name__ == "__main__":
    main()
