"""Read what is at an http or https URL that a record names, and ask no private address for it.

The address is checked of the very connection that is used, and of each that a redirect leads to.
"""

import http.client
import socket
import time
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    Request,
)

from cafe.data.files import file_errors
from cafe.data.trust import check_public
from cafe.errors import RecordError
from cafe.images.files import check_size

TIMEOUT = 30  # seconds that a server may be silent
MAX_SECONDS = 300  # for all of an image
_CHUNK = 2**20  # bytes


def read_web(url: str, max_bytes: int, trust_host: bool = False) -> bytes:
    """Read an image from a public web server.

    Args:
        url: the image's.
        max_bytes: a larger image is refused.
        trust_host: let the URL's own host be at a private address.

    Raises:
        RecordError: the image is too large or takes too long, or a private address was to be asked.
        CafeError: it cannot be read.
    """
    trusted = urlsplit(url).hostname if trust_host else None
    with file_errors(url):
        try:
            return _read(url, max_bytes, partial(_connect, trusted))
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__} {error}") from error


def _read(url: str, max_bytes: int, connect: Any) -> bytes:
    """Read what is at a URL, by connections that `connect` makes."""
    request = Request(url, headers={"User-Agent": "cafe"})
    deadline = time.monotonic() + MAX_SECONDS
    pieces: list[bytes] = []
    with _opener(connect).open(request, timeout=TIMEOUT) as response:
        while piece := response.read(_CHUNK):
            pieces.append(piece)
            check_size(url, sum(map(len, pieces)), max_bytes)
            if time.monotonic() > deadline:
                raise RecordError(f"The image {url} takes more than {MAX_SECONDS} seconds.")
    return b"".join(pieces)


def _opener(connect: Any) -> OpenerDirector:
    """Make what opens URLs: without proxies, and without handlers of other schemes, to which a redirect could lead."""

    def connection(kind: type[http.client.HTTPConnection], host: str, **options: Any) -> http.client.HTTPConnection:
        """Make a connection that is not opened yet."""
        made = kind(host, **options)
        made._create_connection = connect  # type: ignore[attr-defined]
        return made

    class PublicHTTP(HTTPHandler):
        """Open http:// by such a connection."""

        def http_open(self, req: Request) -> Any:
            """Open a request."""
            return self.do_open(partial(connection, http.client.HTTPConnection), req)

    class PublicHTTPS(HTTPSHandler):
        """Open https:// by such a connection."""

        def https_open(self, req: Request) -> Any:
            """Open a request."""
            return self.do_open(partial(connection, http.client.HTTPSConnection), req)

    opener = OpenerDirector()
    for handler in (PublicHTTP, PublicHTTPS, HTTPRedirectHandler, HTTPDefaultErrorHandler, HTTPErrorProcessor):
        opener.add_handler(handler())
    return opener


def _connect(trusted: str | None, address: tuple[str, int], *options: Any) -> socket.socket:
    """Connect to a host at one of its addresses, which are checked first."""
    host, port = address
    if host == trusted:
        return socket.create_connection(address, *options)
    error: OSError | None = None
    for public in check_public(host, port):
        try:
            return socket.create_connection((public, port), *options)
        except OSError as refused:
            error = refused
    raise error or OSError(f"{host} has no address")
