"""What tests send to a server, and how: by the real client, by plain requests, and by bare sockets."""

import base64
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import requests
from samples import png

from cafe.serving.engine import Engine
from cafe.serving.jobs import Job

RED, BLUE = png("red"), png("blue")


def data_uri(data: bytes = RED) -> str:
    """Write an image as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image_part(data: bytes = RED) -> dict[str, Any]:
    """Return an image as a part of a turn."""
    return {"type": "image_url", "image_url": {"url": data_uri(data)}}


def text_part(text: str) -> dict[str, Any]:
    """Return a text as a part of a turn."""
    return {"type": "text", "text": text}


def user(*content: str | bytes) -> dict[str, Any]:
    """Return a turn of a user: strings are texts, and bytes images."""
    parts = [image_part(each) if isinstance(each, bytes) else text_part(each) for each in content]
    return {"role": "user", "content": parts}


class Http:
    """A client for requests that the real one would not send."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **options: Any) -> requests.Response:
        """Send a GET request."""
        return requests.get(self.url + path, timeout=60, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> requests.Response:
        """Send a POST request."""
        return requests.post(self.url + path, json=json, timeout=60, **options)

    def embed(self, value: Any, **fields: Any) -> requests.Response:
        """Ask for embeddings."""
        return self.post("/v1/embeddings", {"input": value, **fields})

    def chat(self, *messages: Any, **fields: Any) -> requests.Response:
        """Ask for an answer of a few tokens."""
        return self.post("/v1/chat/completions", {"messages": messages, "max_tokens": 4, "temperature": 0, **fields})


def error_of(response: requests.Response) -> tuple[int, str]:
    """Return the status and the code of an error, whose answer has all that errors have."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"].endswith(".")
    assert response.headers["X-Request-Id"]
    return response.status_code, error["code"]


def send_raw(url: str, *pieces: bytes) -> bytes:
    """Send bytes to a server, and return all that it answers until it closes the connection."""
    with connect(url) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def connect(url: str) -> socket.socket:
    """Open a connection to a server."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def post_head(length: int | None, path: str = "/v1/embeddings") -> bytes:
    """Return the headers of a POST request; without a length, its body comes in chunks."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{size}\r\n\r\n".encode()


@contextmanager
def blocked(engine: Engine) -> Iterator[None]:
    """Keep an engine from its jobs until the context ends."""
    started, release = Event(), Event()

    def block() -> None:
        """Wait in the engine's thread."""
        started.set()
        release.wait()

    engine.run(block)
    started.wait()
    try:
        yield
    finally:
        release.set()


class RecordingEngine:
    """An engine that notes the jobs it was given."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.jobs = engine, list[Job]()

    def submit(self, job: Job) -> None:
        """Take a job."""
        self._engine.submit(job)
        self.jobs.append(job)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
