"""The client of the server's benchmarks reads responses however they are cut, and says what it was sent."""

import asyncio
import base64
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from serving_client import Connection, Response, encode_request, read_vectors

OK = b"HTTP/1.1 200 OK\r\n"
EVENTS = (
    b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
    b'data: {"choices": [{"delta": {"content": "two \xc3\xa9"}}]}\n\n'
    b'data: {"choices": [{"delta": {"content": "words"}}]}\n\n'
    b'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\n'
    b"data: [DONE]\n\n"
)


def chunked(body: bytes, size: int) -> bytes:
    """Frame a body in chunks of a size, as RFC 9112 has it."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%X\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def exchange(answers, ask, cut=10**6):
    """Have a server give one answer after the other, in pieces of a size, and return what a client makes of them."""
    received = []

    async def serve(reader, writer):
        """Answer each request with the next answer; close the connection where it says so."""
        while answers:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            received.append(head + await reader.readexactly(length))
            answer = answers.pop(0)
            for start in range(0, len(answer), cut):
                writer.write(answer[start : start + cut])
                await writer.drain()
            if b"connection: close" in answer.lower():
                break
        writer.close()

    async def run():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server, Connection(*server.sockets[0].getsockname()) as connection:
            return await ask(connection)

    return asyncio.run(run()), received


async def ask_twice(connection):
    return [await connection.request(encode_request("/a", {"b": 1})), await connection.request(encode_request("/c"))]


@pytest.mark.parametrize("cut", [1, 7, 10**6])
def test_bodies_by_length_and_in_chunks_are_read_whole(cut):
    answers = [
        OK + b"Content-Length: 5\r\nX-Request-Id: me\r\n\r\nwords",
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b"other words", 4),
    ]
    (first, second), received = exchange(answers, ask_twice, cut)
    assert (first.status, first.body, first.headers["x-request-id"]) == (200, b"words", "me")
    assert second.body == b"other words"
    assert received[0].startswith(b"POST /a HTTP/1.1\r\nHost: 127.0.0.1\r\n") and received[0].endswith(
        b'\r\n\r\n{"b": 1}'
    )
    assert received[1].startswith(b"GET /c HTTP/1.1\r\n")


def test_connection_that_was_closed_is_opened_again():
    answers = [OK + b"Content-Length: 1\r\nConnection: close\r\n\r\na", OK + b"Content-Length: 1\r\n\r\nb"]
    (first, second), _ = exchange(answers, ask_twice)
    assert (first.body, second.body) == (b"a", b"b")


@pytest.mark.parametrize("size", [1, 10, 64, 10**4])
def test_streamed_answer_is_read_however_it_is_cut(size):
    head = OK + b"Content-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def ask(connection):
        return await connection.stream(encode_request("/v1/chat/completions", {}))

    answer, _ = exchange([head + chunked(EVENTS, size)], ask)
    assert (answer.status, answer.text, answer.num_tokens, answer.finished) == (200, "two éwords", 7, True)
    assert len(answer.times) == 2 and len(answer.gaps) == 1 and answer.first > 0


def test_stream_that_ends_early_or_with_an_error_is_not_finished():
    head = OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def ask(connection):
        return await connection.stream(encode_request("/", {}))

    early, _ = exchange([head + chunked(EVENTS[: EVENTS.index(b"data: [DONE]")], 50)], ask)
    assert early.text == "two éwords" and not early.finished
    failed, _ = exchange([head + chunked(b'data: {"error": {"code": "internal_error"}}\n\n', 50)], ask)
    assert b"internal_error" in failed.body and not failed.finished


def test_refused_stream_has_the_error_and_when_to_come_again():
    body = b'{"error": {"code": "overloaded"}}'
    head = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 2\r\nContent-Type: application/json\r\n"

    async def ask(connection):
        return await connection.stream(encode_request("/", {}))

    answer, _ = exchange([head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)], ask)
    assert (answer.status, answer.headers["retry-after"], answer.body) == (429, "2", body)
    assert Response(answer.status, answer.headers, answer.body).error_code == "overloaded"


def test_vectors_are_read_as_numbers_and_as_base64():
    expected = np.array([[0.5, -2.0], [1.0, 3.0]], np.float32)
    numbers = Response(200, {}, b'{"data": [{"embedding": [0.5, -2]}, {"embedding": [1, 3]}]}')
    encoded = [base64.b64encode(row.astype("<f4").tobytes()) for row in expected]
    packed = Response(200, {}, b'{"data": [{"embedding": "%s"}, {"embedding": "%s"}]}' % tuple(encoded))
    np.testing.assert_array_equal(read_vectors(numbers), expected)
    np.testing.assert_array_equal(read_vectors(packed), expected)
