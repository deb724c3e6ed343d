"""Who may ask, and how large a question may be."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
from http_samples import blocked, connect, error_of, post_head, send_raw
from starlette.datastructures import Headers

from cafe.serving.config import EngineConfig, ServingConfig
from cafe.serving.connection import Connection
from cafe.serving.errors import ApiError
from cafe.serving.security import check_host, check_origin, is_loopback

KEY = "a-key-of-some-length"
BODY = {"input": "a"}


def is_allowed(check, headers, **config):
    """Tell whether a check lets headers through."""
    try:
        check(Headers(headers), ServingConfig(**config))
    except ApiError as error:
        assert error.status == 403
        return False
    return True


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "localhost.", "127.0.0.1", "[::1]"])
def test_a_server_is_called_by_the_names_of_loopback(name):
    assert is_allowed(check_host, {"host": name}) and is_allowed(check_host, {"host": f"{name}:8000"})


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "192.168.1.5", "", "[", "127.0.0.1@x"])
def test_a_server_is_called_by_no_other_name(name):
    assert not is_allowed(check_host, {"host": name})


def test_a_server_is_called_by_its_own_name_and_those_that_are_allowed():
    config = {"host": "10.0.0.7", "allowed_hosts": ("Photos.example",)}
    assert is_allowed(check_host, {"host": "10.0.0.7:8000"}, **config)
    assert is_allowed(check_host, {"host": "photos.example"}, **config)
    assert not is_allowed(check_host, {"host": "10.0.0.8"}, **config)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_server_on_all_addresses_is_called_by_addresses_and_not_by_names(host):
    assert is_allowed(check_host, {"host": "192.168.1.5:8000"}, host=host)
    assert is_allowed(check_host, {"host": "[fe80::1]:8000"}, host=host)
    assert not is_allowed(check_host, {"host": "evil.example"}, host=host)


def test_pages_of_the_same_address_may_ask():
    host = {"host": "localhost:8000"}
    assert is_allowed(check_origin, host)
    assert is_allowed(check_origin, {**host, "origin": "http://localhost:8000"})
    for origin in ("http://localhost:3000", "https://evil.example", "null", "file://localhost:8000", ""):
        assert not is_allowed(check_origin, {**host, "origin": origin})
    assert is_allowed(check_origin, {**host, "origin": "https://app.example:99"}, allowed_hosts=("app.example",))


@pytest.mark.parametrize("header", ["Host", "Origin"])
def test_another_host_or_origin_gets_403(http, header):
    for path in ("/v1/models", "/health"):
        response = http.get(path, headers={header: "http://evil.example"})
        assert error_of(response) == (403, f"{header.lower()}_not_allowed")
    assert error_of(http.post("/v1/embeddings", BODY, headers={header: "http://evil.example"}))[0] == 403
    assert http.get("/v1/models").ok


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.0.0.2", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("a", False)],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected


def test_a_key_is_asked_for_by_all_but_the_page_and_the_health(serve):
    server = serve(api_key=KEY)
    right = {"Authorization": f"Bearer {KEY}"}
    assert server.get("/health").ok and server.get("/ready").ok
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing", "/search", "/thumbnails/1"):
        response = server.get(path)
        assert error_of(response) == (401, "invalid_api_key") and response.headers["WWW-Authenticate"] == "Bearer"
        assert server.get(path, headers=right).status_code != 401
    for wrong in (f"Basic {KEY}", "Bearer ", "Bearer other", f"Bearer {KEY}x", KEY, "Bearer \xe9"):
        headers = {"Authorization": wrong.encode("latin-1")}
        assert error_of(server.post("/v1/embeddings", BODY, headers=headers))[0] == 401
    assert server.post("/v1/embeddings", BODY, headers=right).ok
    assert error_of(server.post("/health", BODY))[0] == 401


def test_a_body_is_json_and_not_compressed(http):
    text = json.dumps(BODY)
    for kind in ("text/plain", "multipart/form-data; boundary=a", "application/x-www-form-urlencoded", ""):
        response = http.post("/v1/embeddings", data=text, headers={"Content-Type": kind})
        assert error_of(response) == (415, "unsupported_media_type")
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert http.post("/v1/embeddings", data=text, headers=headers).ok
    for encoding in ("gzip", "deflate", "br"):
        response = http.post(
            "/v1/embeddings", data=gzip.compress(text.encode()), headers={**headers, "Content-Encoding": encoding}
        )
        assert error_of(response) == (415, "unsupported_encoding")


def test_a_large_body_is_refused_by_what_its_headers_say(url, services):
    most = services.config.limits.max_body_bytes
    answer = send_raw(url, post_head(most + 1))  # nothing of it is sent
    assert answer.startswith(b"HTTP/1.1 413") and b'"body_too_large"' in answer


def test_an_endless_body_is_refused_while_it_comes(url, http, services):
    most = services.config.limits.max_body_bytes
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = send_raw(url, post_head(None), *[chunk] * (most // 0x10000 + 1))
    assert answer.startswith(b"HTTP/1.1 413") and b'"body_too_large"' in answer
    assert http.embed("a").ok


def test_a_body_that_does_not_come_is_given_up(serve):
    server = serve(body_timeout=0.2)
    answer = send_raw(server.url, post_head(100), b'{"input": ')
    assert answer.startswith(b"HTTP/1.1 408") and b'"body_timeout"' in answer
    assert server.embed("a").ok


def test_a_client_that_goes_in_the_midst_of_its_body_leaves_nothing(url, http):
    with connect(url) as connection:
        connection.sendall(post_head(100) + b"{")
    assert http.embed("a").ok


@pytest.mark.parametrize("path", ["/health", "/nothing", "/v1/embeddings"])
def test_every_answer_has_the_headers(http, path):
    headers = http.get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "server" not in headers


def test_websockets_are_refused(url):
    head = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    with connect(url) as connection:
        connection.sendall(f"{head}Sec-WebSocket-Key: YQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        assert not connection.recv(65536).startswith(b"HTTP/1.1 101")


def test_headers_that_do_not_come_close_the_connection(url, http, monkeypatch):
    monkeypatch.setattr(Connection, "header_seconds", 0.2)
    assert send_raw(url) == b""
    assert send_raw(url, b"GET /health HTTP/1.1\r\nHost: loc") == b""
    # The second request on a connection too.
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health")
        while connection.recv(65536):
            pass
    assert http.embed("a").ok


def test_a_connection_may_wait_between_requests(url, monkeypatch):
    monkeypatch.setattr(Connection, "header_seconds", 0.1)
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname, parts.port)
    for _ in range(3):
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        connection.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):  # and not the end of the connection
            connection.sock.recv(1)
        connection.sock.settimeout(30)
    connection.close()


def test_more_requests_than_can_wait_are_refused(serve, services):
    server = serve(engine_config=EngineConfig(max_waiting=1, max_chats=1))
    with ThreadPoolExecutor(3) as pool:
        with blocked(services.engine):
            asking = [pool.submit(server.embed, "a") for _ in range(3)]
            refused = next(as_completed(asking))
            assert error_of(refused.result()) == (429, "overloaded")
            assert server.get("/health").ok
        assert all(each.result().ok for each in asking if each is not refused)


def test_bodies_are_held_up_to_a_limit(serve):
    server = serve(max_body_bytes=1000)
    body = json.dumps({"input": "a" * 900}).encode()
    waiting = [connect(server.url) for _ in range(8)]
    for connection in waiting:  # all but the last byte, so that the server holds them
        connection.sendall(post_head(len(body)) + body[:-1])
    while (response := server.embed("b" * 900)).ok:
        pass
    assert error_of(response) == (429, "overloaded")
    for connection in waiting:
        connection.close()
    while not server.embed("b" * 900).ok:
        pass
