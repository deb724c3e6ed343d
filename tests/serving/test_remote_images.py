"""Downloads of images: from a real server on loopback, which stands for public ones, and never from anywhere else."""

import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from samples import png

from cafe.errors import RecordError
from cafe.serving.config import RequestLimits
from cafe.serving.remote_images import BAD_URL, UNREACHABLE, FetchRules, fetch_image, resolve

IMAGE = png("red", (30, 20))
LIMITS = RequestLimits(max_image_bytes=100_000)


@dataclass
class Web:
    """A server on loopback, and the names that resolve to it."""

    port: int
    pages: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    requests: list[Any] = field(default_factory=list)
    resolved: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str, host: str = "photos.example") -> str:
        return f"http://{host}:{self.port}{path}"

    def resolve(self, host: str, port: int) -> list[str]:
        """Resolve the names of this web; others, and addresses, as usual."""
        self.resolved.append(host)
        return ["127.0.0.1"] if host.endswith(".example") else resolve(host, port)

    @property
    def rules(self) -> FetchRules:
        """Take the server's own names for public ones, and nothing else."""
        return FetchRules(
            ports=frozenset({self.port}),
            resolve=self.resolve,
            is_allowed=lambda address: address == "127.0.0.1" and self.resolved[-1].endswith(".example"),
        )


def send(body: bytes, content_type: str = "image/png", status: int = 200, **headers: str) -> Callable[..., None]:
    """Make a page of bytes."""

    def page(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Type", content_type)
        request.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return page


def redirect(url: str, status: int = 302) -> Callable[..., None]:
    return send(b"", status=status, Location=url)


@pytest.fixture
def web() -> Iterator[Web]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.requests.append((self.path, dict(self.headers)))
            with suppress(OSError):  # the client has gone
                site.pages[self.path](self)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = Web(server.server_port)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield site
    site.closing.set()
    server.shutdown()
    server.server_close()


def refuse(url: str, rules: FetchRules, sentence: str) -> None:
    with pytest.raises(RecordError) as error:
        fetch_image(url, LIMITS, rules)
    assert str(error.value) == sentence
    assert error.value.__cause__ is None


def test_an_image_is_downloaded(web, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    web.pages["/a.png?size=2&x=%2F"] = send(IMAGE)
    web.pages["/b"] = send(IMAGE, "binary/octet-stream")
    assert fetch_image(web.url("/a.png?size=2&x=%2F#part"), LIMITS, web.rules) == IMAGE
    assert fetch_image(web.url("//b"), LIMITS, web.rules) == IMAGE
    headers = web.requests[0][1]
    assert headers["Host"] == f"photos.example:{web.port}"
    assert headers.keys() == {"Host", "Accept", "Accept-Encoding", "User-Agent", "Connection"}


def test_a_body_of_chunks_is_downloaded(web):
    def page(request: BaseHTTPRequestHandler) -> None:
        request.protocol_version = "HTTP/1.1"
        request.send_response(200)
        request.send_header("Content-Type", "image/png")
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for part in (IMAGE[:10], IMAGE[10:]):
            request.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        request.wfile.write(b"0\r\n\r\n")

    web.pages["/"] = page
    assert fetch_image(web.url(""), LIMITS, web.rules) == IMAGE


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_three_times(web, status):
    web.pages |= {
        "/1": redirect("/2", status),
        "/2": redirect(web.url("/3", "other.example"), status),
        "/3": redirect("4", status),
        "/4": send(IMAGE),
        "/0": redirect("/1", status),
        "/loop": redirect("/loop", status),
    }
    assert fetch_image(web.url("/1"), LIMITS, web.rules) == IMAGE
    assert web.resolved == ["photos.example", "photos.example", "other.example", "other.example"]
    refuse(web.url("/0"), web.rules, UNREACHABLE)
    refuse(web.url("/loop"), web.rules, UNREACHABLE)


# Ways to write inner addresses. Those that are no host in the usual form are refused before anything is resolved.
UNUSUAL = ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0x7f.1", "127.0.0.1.", "[::1%25lo]", "1.2.3.4.5"]
INNER = ["127.0.0.1", "169.254.169.254", "10.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "localhost"]


@pytest.mark.parametrize("host", [*UNUSUAL, *INNER, "localhost."])
def test_inner_hosts_are_refused_directly_and_by_redirect(web, host):
    sentence = BAD_URL if host in UNUSUAL else UNREACHABLE
    web.pages |= {"/secret": send(IMAGE), "/a": redirect(web.url("/secret", host))}
    refuse(web.url("/secret", host), web.rules, sentence)
    # By the rules of a real server, too.
    refuse(f"http://{host}/secret", FetchRules(timeout=5), sentence)
    assert not web.requests
    refuse(web.url("/a"), web.rules, sentence)
    assert [path for path, _ in web.requests] == ["/a"]


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "/etc/passwd", "ftp://photos.example/a", "gopher://photos.example", "data:image/png,", "",
        "http://", "http:///a", "http:photos.example", "//photos.example/a", "http://photos.example\\@other.example/",
        "http://photos.example/a b", "http://photos.example/\r\nX: y", "http://photos.example/\x00", "http://ä.example/",
        "http://photos.example/ä", "http://[::1/", "http://[photos.example]/", "http://photos.example:x/",
        "http://photos.example:99999/", "http://pho$tos.example/", "http://%6c%6f.example/", "http://a/" + "a" * 5000,
        "jar:http://photos.example!/", "HTTP//photos.example",
    ],
)  # fmt: skip
def test_what_is_no_web_address_is_refused_directly_and_by_redirect(web, url):
    refuse(url, web.rules, BAD_URL)
    assert not web.resolved
    # The server cannot send others in a header, and those without a host are pages of its own.
    if re.match("[a-z]+://[^/]|jar:|data:", url) and url.isascii() and url.isprintable() and len(url) < 100:
        web.pages["/a"] = redirect(url)
        with pytest.raises(RecordError):
            fetch_image(web.url("/a"), LIMITS, web.rules)
        assert web.resolved == ["photos.example"] and len(web.requests) == 1


def test_user_names_and_other_ports_are_refused(web):
    sentence = "The image's URL has a user name in it, which is not taken."
    for user in ("me@", "me:secret@", "@", "127.0.0.1@"):
        refuse(f"http://{user}photos.example:{web.port}/", web.rules, sentence)
    for port in (0, 1, 22, 6379, 8080, 65535):
        refuse(f"http://photos.example:{port}/", FetchRules(), "The image's URL has a port other than the web's.")
    assert not web.resolved


def test_a_name_with_one_inner_address_is_refused(web):
    rules = replace(web.rules, resolve=lambda host, port: ["127.0.0.1", "10.0.0.1"], is_allowed="127.0.0.1".__eq__)
    refuse(web.url("/"), rules, UNREACHABLE)
    assert not web.requests


def test_a_name_that_changes_between_the_check_and_the_connection_does_not_matter(web):
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.3"]])
    rules = replace(web.rules, resolve=lambda host, port: next(answers), is_allowed="127.0.0.1".__eq__)
    web.pages |= {"/": send(IMAGE), "/a": redirect("/")}
    assert fetch_image(web.url("/"), LIMITS, rules) == IMAGE
    assert next(answers) == ["127.0.0.2"]  # it was asked once
    # Each redirect is checked again.
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])
    refuse(web.url("/a"), rules, UNREACHABLE)
    assert [path for path, _ in web.requests] == ["/", "/a"]


def test_the_next_address_is_tried_where_one_does_not_answer(web):
    rules = replace(web.rules, resolve=lambda host, port: ["127.0.0.9", "127.0.0.1"], is_allowed=lambda address: True)
    web.pages["/"] = send(IMAGE)
    assert fetch_image(web.url("/"), LIMITS, rules) == IMAGE


def test_a_host_that_does_not_answer_sounds_like_one_that_may_not_be_asked(web):
    def fail(host: str, port: int) -> list[str]:
        raise OSError("Name or service not known")

    refuse(web.url("/"), replace(web.rules, resolve=fail), UNREACHABLE)
    refuse(web.url("/"), replace(web.rules, resolve=lambda host, port: []), UNREACHABLE)
    refuse(web.url("/"), replace(web.rules, resolve=lambda host, port: ["127.0.0.9"]), UNREACHABLE)
    refuse("http://photos.example:1/", replace(web.rules, ports=frozenset({1})), UNREACHABLE)
    long = "a" * 70 + ".example"  # a name that cannot be encoded
    refuse(web.url("/", long), replace(web.rules, resolve=resolve), UNREACHABLE)
    web.pages |= {"/404": send(IMAGE, status=404), "/500": send(IMAGE, status=500), "/304": send(b"", status=304)}
    for path in web.pages:
        refuse(web.url(path), web.rules, UNREACHABLE)


def test_only_images_are_taken(web):
    for kind in ("text/html", "application/json", "imagex/png", "image/", "nonsense"):
        web.pages["/"] = send(IMAGE, kind)
        refuse(web.url("/"), web.rules, "There is no image at the image's URL.")


@pytest.mark.parametrize("length", ["", "7", "100000000000"])
def test_an_endless_body_is_cut_at_the_limit(web, length):
    def page(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "image/png")
        if length:
            request.send_header("Content-Length", length)
        request.end_headers()
        while not web.closing.is_set():
            request.wfile.write(bytes(10_000))

    web.pages["/"] = page
    if length == "7":  # the rest is not the body's
        assert fetch_image(web.url("/"), LIMITS, web.rules) == bytes(7)
    else:
        refuse(web.url("/"), web.rules, "The image at the URL has more than 100,000 bytes.")


def test_a_body_of_exactly_the_limit_is_taken(web):
    web.pages |= {"/a": send(bytes(100_000)), "/b": send(bytes(100_001))}
    assert fetch_image(web.url("/a"), LIMITS, web.rules) == bytes(100_000)
    refuse(web.url("/b"), web.rules, "The image at the URL has more than 100,000 bytes.")


HEADERS = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (HEADERS + b"\r\n", b"."),
        (HEADERS + b"X: ", b"."),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (HEADERS + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n.\r\n"),
        (HEADERS, b""),
    ],
)
def test_an_answer_that_drips_ends_at_the_deadline(web, start, piece):
    def page(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(start)
        while not web.closing.wait(0.02):  # often enough that no single read takes long
            request.wfile.write(piece)

    web.pages["/"] = page
    refuse(web.url("/"), replace(web.rules, timeout=0.3), UNREACHABLE)


def test_a_name_that_takes_too_long_ends_at_the_deadline(web):
    def wait(host: str, port: int) -> list[str]:
        web.closing.wait()
        return []

    refuse(web.url("/"), replace(web.rules, resolve=wait, timeout=0.1), UNREACHABLE)


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 999999 no\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200,
        HEADERS + b"Transfer-Encoding: chunked\r\n\r\nnot hexadecimal\r\n", b"HTTP/1.1 302 Found\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n", b"HTTP/1.1 302 Found\r\nLocation: /\xe4\r\n\r\n",
        HEADERS + b"X: " + b"y" * 100_000,
    ],
)  # fmt: skip
def test_an_answer_that_is_no_http_is_refused(web, answer):
    web.pages["/"] = lambda request: request.wfile.write(answer)
    with pytest.raises(RecordError) as error:
        fetch_image(web.url("/"), LIMITS, web.rules)
    assert str(error.value) in (UNREACHABLE, BAD_URL)


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is nothing to make a certificate")
def test_certificates_are_checked_for_the_name_in_the_url(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-subj", "/CN=photos.example"]
    words += ["-addext", "subjectAltName=DNS:photos.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *words], check=True, capture_output=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            send(IMAGE)(self)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    rules = FetchRules(
        ports=frozenset({server.server_port}),
        resolve=lambda host, port: ["127.0.0.1"],
        is_allowed=lambda address: True,
        make_tls=lambda: ssl.create_default_context(cafile=certificate),
    )
    url = f"https://photos.example:{server.server_port}/"
    assert fetch_image(url, LIMITS, rules) == IMAGE
    refuse(url.replace("photos", "other"), rules, UNREACHABLE)
    refuse(url, replace(rules, make_tls=ssl.create_default_context), UNREACHABLE)
    server.shutdown()
    server.server_close()
