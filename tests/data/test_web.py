"""Images on the web are read within limits, and no redirect leads to a private address."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from samples import png

from cafe.data import trust, web
from cafe.data.image_fields import image_refs
from cafe.data.source import Source
from cafe.data.web import read_web
from cafe.errors import CafeError, RecordError


class Site(BaseHTTPRequestHandler):
    """Serves an image, an endless file and redirects, and notes what was asked."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith(("/to/", "/away")):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/").replace("/away", "http://localhost/a.png"))
            self.end_headers()
            return
        self.send_response(200 if self.path in ("/a.png", "/long") else 404)
        self.end_headers()
        self.wfile.write(png("red") if self.path == "/a.png" else b"")
        while self.path == "/long":
            try:
                self.wfile.write(bytes(100_000))
            except OSError:
                return

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture
def site(monkeypatch) -> Iterator[str]:
    """A web server, whose host public.test counts as public."""
    # All of 127.0.0.0/8 is this machine.
    server = ThreadingHTTPServer(("0.0.0.0", 0), Site)
    Site.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    look_up = socket.getaddrinfo

    def getaddrinfo(host, *arguments, **options):
        return look_up("127.0.0.2" if host == "public.test" else host, *arguments, **options)

    is_public = trust._is_public
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(trust, "_is_public", lambda address: address == "127.0.0.2" or is_public(address))
    yield f"http://public.test:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_an_image_of_a_listed_scheme_is_read(site):
    assert read_web(f"{site}/a.png", 10**6) == png("red")
    [ref] = image_refs(f"{site}/a.png", Source(path="x.jsonl", allow_urls=("http",)))
    assert ref.source == png("red")
    with pytest.raises(RecordError, match=r"allow_urls: \[http\]"):
        image_refs(f"{site}/a.png", Source(path="x.jsonl"))
    with pytest.raises(CafeError, match="404"):
        read_web(f"{site}/none.png", 10**6)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_no_redirect_leads_to_a_private_address(site, host):
    port = site.rpartition(":")[2]
    assert read_web(f"{site}/to/{site}/a.png", 10**6) == png("red")
    Site.asked.clear()
    with pytest.raises(RecordError, match="private address"):
        read_web(f"{site}/to/http://{host}:{port}/a.png", 10**6)
    assert len(Site.asked) == 1


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x"])
def test_a_redirect_to_another_scheme_is_not_followed(site, url):
    with pytest.raises(CafeError, match="cannot be read"):
        read_web(f"{site}/to/{url}", 10**6)


def test_an_image_on_the_web_that_is_too_large_or_too_slow_is_refused(site, monkeypatch):
    with pytest.raises(RecordError, match=r"data\.max_image_bytes"):
        read_web(f"{site}/long", 3 * 10**6)
    monkeypatch.setattr(web, "MAX_SECONDS", 0)
    with pytest.raises(RecordError, match="takes more than 0 seconds"):
        read_web(f"{site}/long", 10**9)


def test_a_source_on_a_private_host_names_images_of_that_host(site):
    """The recipe names the source, so its host is trusted."""
    private = site.replace("public.test", "127.0.0.1")
    [ref] = image_refs("a.png", Source(path=f"{private}/a.jsonl"))
    assert ref.source == png("red")
    with pytest.raises(RecordError, match="private address"):
        image_refs("away", Source(path=f"{private}/a.jsonl"))
