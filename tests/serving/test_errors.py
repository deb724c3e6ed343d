"""Faults that others' servers had, each followed by a good request; and what errors tell, and do not tell."""

import contextlib
import io
import json
import logging
import re
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from http_samples import RED, data_uri, error_of, send_raw, user
from PIL import Image

from cafe.serving.encoding import JobEncoder
from cafe.serving.errors import describe_error
from cafe.serving.jobs import DeadlineError, EngineError, NotReadyError, OverloadedError

SECRET = re.compile(r"0x[0-9a-f]{6}|/[a-z]+/|\.py|Traceback|PIL|BytesIO|Error:", re.IGNORECASE)


def bomb() -> bytes:
    """A small PNG file whose header says that it has billions of pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def large() -> bytes:
    """A PNG file with a few more pixels than are allowed."""
    out = io.BytesIO()
    Image.new("L", (1001, 1000)).save(out, "PNG")
    return out.getvalue()


BAD_IMAGES = {
    "noise": np.random.default_rng(0).bytes(400),
    "truncated": RED[: len(RED) // 2],
    "bomb": bomb(),
    "too many pixels": large(),
    "html": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "zero": b"\0",
}


@pytest.fixture
def good(http, served_model):
    """A function that sends a good request and checks its answer, by the same server."""

    def check(server=http):
        """Embed an image and a text."""
        answer = server.embed([{"image": data_uri(RED)}, "words"])
        vectors = np.array([each["embedding"] for each in answer.json()["data"]])
        np.testing.assert_allclose(vectors, served_model.embed([{"image": RED}, "words"]), atol=1e-5)
        assert server.get("/health").ok

    return check


@pytest.mark.parametrize("data", BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
@pytest.mark.parametrize("route", ["embeddings", "chat", "rerank"])
def test_a_bad_image_gets_a_sentence_of_ours(http, good, data, route):
    if route == "embeddings":
        response = http.embed([{"image": data_uri(data)}])
    elif route == "chat":
        response = http.chat(user("what is it?", data))
    else:
        response = http.post("/v1/rerank", {"query": "a", "documents": ["b", {"image": data_uri(data)}]})
    assert error_of(response) == (400, "image_decode_failed")
    message = response.json()["error"]["message"]
    assert "image 1" in message and not SECRET.search(message)
    good()


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (3, 2)])
def test_a_tiny_image_is_read_or_refused_cleanly(http, good, size):
    out = io.BytesIO()
    Image.new("RGB", size).save(out, "PNG")
    assert http.embed([{"image": data_uri(out.getvalue())}]).status_code in (200, 400)
    assert http.chat(user(out.getvalue(), "what is it?")).status_code in (200, 400)
    good()


@pytest.mark.parametrize(
    "value",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://example.com/cat.png",
        "file:///etc/passwd",
        "ftp://example.com/a",
        "data:image/png,abc",
        "data:text/html;base64",
        "",
    ],
)
def test_nothing_is_fetched_and_no_file_is_opened(http, good, value):
    part = {"type": "image_url", "image_url": {"url": value}}
    code = "image_url_not_allowed"
    assert error_of(http.chat({"role": "user", "content": [part]})) == (400, code)
    response = http.embed([{"image": value}])
    assert error_of(response)[0] == 400
    good()


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "cat.png", "~/cat.png"])
def test_a_path_is_no_image(http, path):
    assert error_of(http.embed([{"image": path}])) == (400, "image_decode_failed")
    assert http.embed(path).ok  # as words


def test_images_are_counted_and_weighed(http, good):
    assert error_of(http.embed([{"image": data_uri(RED)}] * 33)) == (400, "too_many_images")
    assert error_of(http.embed([{"content": user(*[RED] * 9)["content"]}])) == (400, "too_many_images")
    assert error_of(http.embed([{"image": data_uri(bytes(2**18 + 1))}])) == (400, "image_too_large")
    good()


def test_placeholders_in_a_text_are_words(http, services, good):
    tokenizer = services.model.chat_processor.tokenizer
    for token in {services.model.chat_processor.placeholder, "<image>", *tokenizer.all_special_tokens}:
        assert http.embed(f"{token} {token}").ok
        assert http.chat(user(RED, token * 3)).ok
    good()


RAW_BODIES = {
    "no json": (b"{", 400),
    "empty": (b"", 422),
    "deep": (b"[" * 100_000, 400),
    "deep value": (b'{"input": ' + b"[" * 5000 + b"]" * 5000 + b"}", 422),
    "deep mapping": (b'{"input": "a", "user": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}", 422),
    "invalid utf-8": (b'{"input": "\xff"}', 400),
    "half a surrogate": (b'{"input": "\\ud800"}', 422),
    "half a surrogate in a name": (b'{"input": "a", "\\ud800": 1}', 400),
    "nan": (b'{"input": "a", "dimensions": NaN}', 422),
    "infinity": (b'{"messages": [{"role": "user", "content": "a"}], "temperature": Infinity}', 422),
    "a huge number": (b'{"input": "a", "dimensions": 1' + b"0" * 5000 + b"}", 400),
    "a large number": (b'{"input": "a", "dimensions": 1' + b"0" * 400 + b"}", 400),
    "null": (b"null", 422),
    "a list": (b"[1]", 422),
    "a control character": (b'{"input": "a", "\\u001b[2J": 1}', 400),
    "no character": (b'{"input": "\\u0000"}', 200),
}


@pytest.mark.parametrize(("body", "status"), RAW_BODIES.values(), ids=RAW_BODIES.keys())
def test_a_body_that_is_no_request(http, good, body, status):
    path = "/v1/chat/completions" if b"temperature" in body else "/v1/embeddings"
    response = http.post(path, data=body, headers={"Content-Type": "application/json"})
    assert response.status_code in ((400, 422) if status >= 400 else (200,)), response.text
    if status >= 400:
        error_of(response)
        assert "\x1b" not in response.text
    good()


def test_what_is_no_http_is_refused(url, good):
    assert send_raw(url, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n").startswith(b"HTTP/1.1 400")
    with contextlib.suppress(ConnectionError):  # it is closed before all is sent
        head = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "
        assert not send_raw(url, head + b"a" * 200_000).startswith(b"HTTP/1.1 2")
    good()


def test_an_unknown_address_and_method(http):
    assert error_of(http.get("/v1/nothing")) == (404, "not_found")
    response = http.get("/v1/embeddings")
    assert error_of(response) == (405, "method_not_allowed") and response.headers["Allow"] == "POST"


class BrokenEncoder(JobEncoder):
    """An encoder whose tokens no model has."""

    def embedding(self, content):
        """Encode a content, with a token that is out of range if it is poison."""
        job = super().embedding(content)
        if content.text == "poison":
            job.branch = replace(job.branch, input_ids=job.branch.input_ids + 10**6)
        if content.text == "bug":
            raise ValueError("/home/secret 0xdeadbeef")
        return job


@pytest.mark.parametrize("text", ["poison", "bug"])
def test_what_the_server_cannot_do_is_logged_and_not_told(services, serve, good, caplog, text):
    server = serve(encoder=BrokenEncoder(services.encoder.chat_processor, services.encoder.limits))
    with caplog.at_level(logging.ERROR, "cafe.serving"):
        response = server.embed(["a", text])
    assert error_of(response) == (500, "internal_error")
    request_id = response.headers["X-Request-Id"]
    assert request_id in response.json()["error"]["message"] and request_id in caplog.text
    assert "secret" not in response.text
    assert text == "poison" or "secret" in caplog.text
    good(server)


def test_a_request_has_the_id_that_its_client_gave_it(http):
    assert http.get("/health", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
    assert http.get("/health", headers={"X-Request-Id": "a b\tc"}).headers["X-Request-Id"] != "a b\tc"
    first, second = (http.get("/health").headers["X-Request-Id"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OverloadedError(0.2), 429, "overloaded"),
        (NotReadyError(), 503, "not_ready"),
        (DeadlineError(), 504, "deadline_exceeded"),
        (EngineError("secret"), 500, "internal_error"),
    ],
)
def test_errors_of_the_engine(error, status, code):
    described = describe_error(error, "id-1")
    assert (described.status, described.code) == (status, code) and "secret" not in json.dumps(described.body())
    assert (described.headers or {}).get("Retry-After") == ("1" if status in (429, 503) else None)
