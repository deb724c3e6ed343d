"""What the benchmarks of the server ask, and the right answers, computed beforehand in this process, one at a time."""

import base64
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any, TypeVar

import numpy as np
from serving_client import Connection, Response, Stream, encode_request, read_vectors
from serving_process import Server

from cafe import Cafe
from cafe.content import Content
from cafe.scenes.draw import paint
from cafe.scenes.words import captions, paragraph
from cafe.scenes.world import draw_scenes

MODEL = "scenes"  # the small one that comes with the package
MIN_COSINE = 0.9999
MAX_TOKENS = 48
PROMPTS = ("Describe the image.", "List everything in the image, one by one, in detail.")
LONG_PROMPT = PROMPTS[1]
JPEG_URI = "data:image/jpeg;base64,"


@dataclass(frozen=True)
class EmbeddingWork:
    """Hold inputs to embed, as the body of a request, and the right embeddings, float32 of shape (inputs, dim)."""

    body: dict[str, Any]
    expected: np.ndarray

    @cached_property
    def message(self) -> bytes:
        """Return the bytes of the request."""
        return encode_request("/v1/embeddings", self.body)

    def is_right(self, response: Response) -> bool:
        """Return whether a response has the right embeddings in the right order."""
        vectors = read_vectors(response)
        return vectors.shape == self.expected.shape and bool(((vectors * self.expected).sum(1) >= MIN_COSINE).all())


@dataclass(frozen=True)
class ChatWork:
    """Hold a chat to answer with a stream, as the body of a request, and the right words."""

    body: dict[str, Any]
    expected: str

    @cached_property
    def message(self) -> bytes:
        """Return the bytes of the request."""
        return encode_request("/v1/chat/completions", self.body)

    def is_right(self, answer: Stream) -> bool:
        """Return whether an answer has the right words and came to its end."""
        return answer.finished and answer.text.strip() == self.expected.strip()


Work = TypeVar("Work", EmbeddingWork, ChatWork)


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Make captions and paragraphs of different lengths, of which no two are the same."""
    chance, texts = Random(seed), dict[str, None]()
    for scene in draw_scenes(seed, "test", 2 * count + 16):
        words = paragraph(scene, chance) if chance.random() < 0.3 else chance.choice(captions(scene.things, 2))
        texts[f"{words} {chance.choice(('', 'It is plain.', 'It is striped.', 'It is large.'))}".strip()] = None
    # Numbered where the small world has no more to say.
    numbered = [text if number < len(texts) else f"{text} {number}" for number, text in enumerate(texts)]
    while len(numbered) < count:
        numbered.append(f"{numbered[len(numbered) % len(texts)]} {len(numbered)}")
    return numbered[:count]


def make_queries(count: int, seed: int = 0) -> list[str]:
    """Make queries as people type them, of a few words, of which no two are the same."""
    clauses = [clause.strip(" .") for text in make_texts(count, seed) for clause in text.split(",")]
    queries = list(dict.fromkeys(clause for clause in clauses if clause.count(" ") < 6))
    # Numbered where the small world has no more to say.
    return [
        queries[number % len(queries)] + (f" {number}" if number >= len(queries) else "") for number in range(count)
    ]


def make_images(count: int, side: int, seed: int = 0) -> list[bytes]:
    """Make JPEG files of a side in pixels."""
    files = []
    for scene in draw_scenes(seed, "test", count):
        buffer = io.BytesIO()
        paint(scene).resize((side, side)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def with_comment(jpeg: bytes, number: int) -> bytes:
    """Return the same image in other bytes, so that no cache knows it: with a comment."""
    comment = f"number {number}".encode()
    return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + jpeg[2:]


def renewed(work: Work, number: int) -> Work:
    """Return the same work with its images in other bytes, see `with_comment`."""

    def renew(value: Any) -> Any:
        """Give each image in a body other bytes."""
        match value:
            case str() if value.startswith(JPEG_URI):
                return data_uri(with_comment(base64.b64decode(value.removeprefix(JPEG_URI)), number))
            case dict():
                return {name: renew(each) for name, each in value.items()}
            case list():
                return [renew(each) for each in value]
        return value

    return replace(work, body=renew(work.body))


def data_uri(image: bytes, kind: str = "jpeg") -> str:
    """Return an image as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def embedding_body(inputs: Sequence[str | bytes | tuple[bytes, str]]) -> dict[str, Any]:
    """Return the body of a request for embeddings of texts, images, and images with a text."""
    items: list[Any] = []
    for value in inputs:
        match value:
            case str():
                items.append(value)
            case bytes():
                items.append({"image": data_uri(value)})
            case image, text:
                items.append({"image": data_uri(image), "text": text})
    return {"input": items, "encoding_format": "base64"}


def chat_body(images: Sequence[bytes], prompt: str, max_tokens: int = MAX_TOKENS) -> dict[str, Any]:
    """Return the body of a request for a greedy, streamed answer."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
    return {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def embedding_work(model: Cafe, inputs: Sequence[str | bytes | tuple[bytes, str]]) -> EmbeddingWork:
    """Embed inputs one at a time."""
    contents = [{"image": value[0], "text": value[1]} if isinstance(value, tuple) else value for value in inputs]
    return EmbeddingWork(embedding_body(inputs), np.concatenate([model.embed([content]) for content in contents]))


def chat_work(model: Cafe, images: Sequence[bytes], prompt: str) -> ChatWork:
    """Answer a chat by itself."""
    expected = model.generate(Content.of(list(images)) if images else None, prompt, MAX_TOKENS)
    assert isinstance(expected, str)
    return ChatWork(chat_body(images, prompt), expected)


def connect(server: Server) -> Connection:
    """Return a connection to a server, which is opened when it is used."""
    return Connection(server.host, server.port)
