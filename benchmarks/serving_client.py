"""A small HTTP/1.1 client for the benchmarks of the server, which costs little of the CPU that both share.

A request is bytes that were made beforehand. A response is read by its length or in chunks, as RFC 9112 frames them.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TIMEOUT = 150.0  # seconds, longer than the server takes until it gives a request up


@dataclass(frozen=True)
class Response:
    """Hold a response.

    Attributes:
        status: of HTTP.
        headers: by their names in lower case.
        body: all of it.
        seconds: from the first byte that was sent to the last that was read.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float = 0.0

    @property
    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)

    @property
    def error_code(self) -> str:
        """Return the code of an error in OpenAI's shape; empty if it has none."""
        try:
            return str(self.json["error"]["code"])
        except (ValueError, KeyError, TypeError):
            return ""


@dataclass
class Stream:
    """Hold a streamed answer.

    Attributes:
        status: of HTTP.
        text: of all pieces.
        sent: when the request was sent, by `time.perf_counter`.
        times: when each piece with words was read.
        num_tokens: what the server counted; 0 if it said nothing.
        finished: whether the stream ended as it should.
        body: of a response that is no stream, such as an error.
        headers: by their names in lower case.
    """

    status: int = 0
    text: str = ""
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    num_tokens: int = 0
    finished: bool = False
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def first(self) -> float:
        """Return the seconds until the first piece."""
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Return the seconds between two pieces."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


def encode_request(
    path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "", host: str = "127.0.0.1"
) -> bytes:
    """Make the bytes of a request.

    Args:
        path: and the query.
        body: bytes as they are, anything else as JSON; None for none.
        headers: that are added, or take the place of the usual ones.
        method: by default GET without a body and POST with one.
        host: of the `Host` header.
    """
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
    head = f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1\r\n"
    return (head + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n").encode() + data


class Connection:
    """Send requests over one connection, one after the other; it is opened again where the server closed it."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> "Connection":
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, whatever is under way."""
        if self._writer:
            self._writer.close()
        self._reader = self._writer = None

    async def request(self, message: bytes) -> Response:
        """Send a request and read the whole response.

        Raises:
            OSError: the connection broke.
            TimeoutError: nothing came.
        """
        started = time.perf_counter()
        async with asyncio.timeout(TIMEOUT):
            status, headers = await self._exchange(message)
            body = b"".join([part async for part in self._body(headers)])
        return Response(status, headers, body, time.perf_counter() - started)

    async def stream(self, message: bytes, max_pieces: int | None = None) -> Stream:
        """Send a request for a streamed answer and read the pieces; after so many, hang up.

        Raises:
            OSError: the connection broke.
            TimeoutError: nothing came.
        """
        answer = Stream(sent=time.perf_counter())
        async with asyncio.timeout(TIMEOUT):
            answer.status, answer.headers = await self._exchange(message)
            # An error comes as it does without streaming.
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                answer.body = b"".join([part async for part in self._body(answer.headers)])
                return answer
            buffered = b""
            async for part in self._body(answer.headers):
                *events, buffered = (buffered + part).split(b"\n\n")
                for event in events:
                    _read_event(event, answer)
                if max_pieces is not None and len(answer.times) >= max_pieces:
                    self.close()
                    return answer
        return answer

    async def send(self, message: bytes) -> None:
        """Send bytes, and wait for no answer."""
        _, writer = await self._open()
        writer.write(message)
        await writer.drain()

    async def read(self) -> Response:
        """Read the response to what was sent."""
        async with asyncio.timeout(TIMEOUT):
            status, headers = await self._head()
            return Response(status, headers, b"".join([part async for part in self._body(headers)]))

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the open connection."""
        if self._reader is None or self._writer is None or self._reader.at_eof():
            self.close()
            self._reader, self._writer = await asyncio.open_connection(self.host, self.port, limit=2**20)
        return self._reader, self._writer

    async def _exchange(self, message: bytes) -> tuple[int, dict[str, str]]:
        """Send a request and read the head of the response."""
        reused = self._reader is not None
        try:
            await self.send(message)
            return await self._head()
        except (ConnectionError, asyncio.IncompleteReadError):
            # A server may close a connection that was idle just when it is used again.
            self.close()
            if not reused:
                raise
            await self.send(message)
            return await self._head()

    async def _head(self) -> tuple[int, dict[str, str]]:
        """Read the status line and the headers."""
        reader, _ = await self._open()
        status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines if line)
        return int(status_line.split(" ")[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def _body(self, headers: dict[str, str]) -> AsyncIterator[bytes]:
        """Yield the body in the parts in which it comes."""
        reader, _ = await self._open()
        if headers.get("transfer-encoding") == "chunked":
            while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                yield (await reader.readexactly(size + 2))[:-2]
            await reader.readuntil(b"\r\n")
        elif length := int(headers.get("content-length", 0)):
            yield await reader.readexactly(length)
        if headers.get("connection") == "close":
            self.close()


def _read_event(event: bytes, answer: Stream) -> None:
    """Add a server-sent event to an answer."""
    if not event.startswith(b"data: "):
        return
    data = event[len(b"data: ") :]
    if data == b"[DONE]":
        answer.finished = True
        return
    piece = json.loads(data)
    # An error that comes once the stream has begun.
    if "error" in piece:
        answer.body = data
        return
    if piece.get("usage"):
        answer.num_tokens = piece["usage"]["completion_tokens"]
    for choice in piece.get("choices", []):
        if words := choice["delta"].get("content"):
            answer.text += words
            answer.times.append(time.perf_counter())


def read_vectors(response: Response) -> np.ndarray:
    """Return the embeddings of a response, float32 of shape (inputs, dim)."""
    rows = [item["embedding"] for item in response.json["data"]]
    if rows and isinstance(rows[0], str):
        return np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in rows])
    return np.array(rows, np.float32)
