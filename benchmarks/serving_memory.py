"""The memory of one server that embeds and chats, beside two servers of which each does one.

The same clients do the same work: 32 embed images while 16 chat about others, with one server or with two. What is
compared is the peak of the memory of all processes, in which what processes share, such as the code of libraries, is
divided between them (PSS); the peak of the resident memory (RSS) is printed as well.

python benchmarks/serving_memory.py [--images 2048] [--chats 512] [--model CHECKPOINT] [--threads N] [--json FILE]
"""

import argparse
import asyncio

from common import Row, show
from serving_client import encode_request
from serving_process import MemorySamples, Server, sample_memory, serve
from serving_work import LONG_PROMPT, MODEL, chat_body, connect, embedding_body, make_images, with_comment

EMBEDDERS, CHATS, SIDE = 32, 16, 512
INTERVAL = 0.1  # seconds between two measurements


async def use(embedding: Server, chatting: Server, num_images: int, num_chats: int) -> None:
    """Embed images with one server, and chat about others with one meanwhile; each image is new."""
    images = make_images(32, SIDE)
    to_embed, to_ask = iter(range(num_images)), iter(range(num_images, num_images + num_chats))

    async def embed() -> None:
        """Embed one image after the other."""
        async with connect(embedding) as connection:
            for number in to_embed:
                body = embedding_body([with_comment(images[number % len(images)], number)])
                response = await connection.request(encode_request("/v1/embeddings", body))
                assert response.status == 200, response

    async def chat() -> None:
        """Chat about one image after the other."""
        async with connect(chatting) as connection:
            for number in to_ask:
                body = chat_body([with_comment(images[number % len(images)], number)], LONG_PROMPT)
                answer = await connection.stream(encode_request("/v1/chat/completions", body))
                assert answer.status == 200 and answer.finished, answer

    await asyncio.gather(*(embed() for _ in range(EMBEDDERS)), *(chat() for _ in range(CHATS)))


def report(name: str, samples: MemorySamples) -> int:
    """Print the peaks, and return that of the memory with what is shared divided."""
    shared, resident = max(samples.shared), max(samples.resident)
    print(f"{name}: {shared / 2**20:,.0f} MiB at the peak ({resident / 2**20:,.0f} resident)", flush=True)
    return shared


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048, help="images to embed")
    parser.add_argument("--chats", type=int, default=512, help="chats, each about an image")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--threads", type=int, help="of PyTorch in each server")
    options, _ = parser.parse_known_args()
    with serve(options.model, threads=options.threads) as server, sample_memory(server, interval=INTERVAL) as samples:
        asyncio.run(use(server, server, options.images, options.chats))
    one = report("one server for both", samples)
    with (
        serve(options.model, threads=options.threads) as embedding,
        serve(options.model, threads=options.threads) as chatting,
        sample_memory(embedding, chatting, interval=INTERVAL) as samples,
    ):
        asyncio.run(use(embedding, chatting, options.images, options.chats))
    two = report("two servers for one each", samples)
    show(
        "The memory of one server for both",
        [Row("peak memory, one server for both / two for one each", one / two, 0.6, 0.52, at_least=False)],
    )


if __name__ == "__main__":
    main()
