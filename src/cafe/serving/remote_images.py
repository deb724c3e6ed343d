"""Download an image from an address that a stranger names, without being led into the server's own network.

A name is resolved once, all of its addresses must be public, and the connection is made to one of these: whatever the
name resolves to a moment later does not matter. Each redirect is checked in the same way.
"""

import io
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from threading import Thread
from typing import Any
from urllib.parse import urljoin, urlsplit

from cafe.errors import RecordError
from cafe.serving.config import RequestLimits
from cafe.serving.public_addresses import is_address, is_public

# The same for a host that is not there and one that may not be asked, so that nobody learns which of both it is.
UNREACHABLE = "The image cannot be downloaded from its URL."
BAD_URL = "The image's URL is not a web address, which begins with http:// or https:// and has no spaces."

DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_URL = 4096  # characters
_URL = re.compile(r"[!-\[\]-~]+")  # ASCII that can be seen, without the backslash, which some take for a slash
_HOST = re.compile(r"[a-z0-9_.-]{1,253}")
_NUMBER = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)\.?")  # a host that some read as an IPv4 address
_REDIRECTS = (301, 302, 303, 307, 308)
_CONTENT_TYPES = re.compile(r"image/.+|(application|binary)/octet-stream")
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "cafe", "Connection": "close"}
_CHUNK = 2**16  # bytes


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host.

    Raises:
        OSError: it has none.
    """
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True, kw_only=True)
class FetchRules:
    """Say where images may be downloaded from.

    Attributes:
        ports: of the hosts. Other ports are those of services that expect no strangers.
        max_redirects: for one image.
        timeout: seconds for an image, from its name to its last byte.
        resolve: returns the addresses of a host and port.
        is_allowed: returns whether an address may be connected to.
        make_tls: makes what checks certificates.
    """

    ports: frozenset[int] = frozenset(DEFAULT_PORTS.values())
    max_redirects: int = 3
    timeout: float = 10.0
    resolve: Callable[[str, int], Sequence[str]] = resolve
    is_allowed: Callable[[str], bool] = is_public
    make_tls: Callable[[], ssl.SSLContext] = ssl.create_default_context


@dataclass(frozen=True)
class _Target:
    """Hold the parts of a URL: it is taken apart once, and nothing else ever reads it."""

    scheme: str
    netloc: str
    host: str
    port: int
    path: str


def fetch_image(url: str, limits: RequestLimits, rules: FetchRules | None = None) -> bytes:
    """Download an image. No cookies are kept, and no proxy is used.

    Args:
        url: where it is, by http or https.
        limits: of a request; the image is no larger than they allow.
        rules: where images may be downloaded from.

    Raises:
        RecordError: it cannot be downloaded, or may not be.
    """
    rules = rules or FetchRules()
    deadline = time.monotonic() + rules.timeout
    for _ in range(rules.max_redirects + 1):
        target = _parse(url, rules)
        try:
            with _connect(target, rules, deadline) as connection:
                response = _request(connection, target, deadline)
                if response.status not in _REDIRECTS:
                    return _read_image(response, limits.max_image_bytes)
                url = urljoin(url, response.headers.get("Location", ""))
        # Whatever goes wrong in a connection is the same to the client. ValueError: a name or header that cannot be.
        except (OSError, HTTPException, ValueError):
            raise RecordError(UNREACHABLE) from None
    raise RecordError(UNREACHABLE)


def _parse(url: str, rules: FetchRules) -> _Target:
    """Take a URL apart.

    Raises:
        RecordError: it is none, or may not be asked for.
    """
    if len(url) > MAX_URL or not _URL.fullmatch(url):
        raise RecordError(BAD_URL)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise RecordError(BAD_URL) from None
    if parts.scheme not in DEFAULT_PORTS or not _is_host(parts.hostname or ""):
        raise RecordError(BAD_URL)
    if "@" in parts.netloc:
        raise RecordError("The image's URL has a user name in it, which is not taken.")
    port = DEFAULT_PORTS[parts.scheme] if port is None else port
    if port not in rules.ports:
        raise RecordError("The image's URL has a port other than the web's.")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _Target(parts.scheme, parts.netloc, parts.hostname or "", port, path)


def _is_host(host: str) -> bool:
    """Return whether something is the name of a host or its address, in the usual form."""
    if ":" in host:
        return "%" not in host and is_address(host)
    if _NUMBER.fullmatch(host):  # 2130706433, 0177.0.0.1 and 127.1 are other ways to write 127.0.0.1
        return is_address(host)
    return bool(_HOST.fullmatch(host))


def _connect(target: _Target, rules: FetchRules, deadline: float) -> socket.socket:
    """Connect to a host, if all of its addresses are public.

    Raises:
        OSError: they are not, or it cannot be reached.
    """
    addresses = _resolve_within(target, rules, deadline)
    if not all(rules.is_allowed(address) for address in addresses):
        raise OSError
    error = OSError()
    for address in dict.fromkeys(addresses):
        try:
            # The address and not the name, which may have another one by now.
            connection = socket.create_connection((address, target.port), _seconds_left(deadline))
        except OSError as reason:
            error = reason
            continue
        if target.scheme == "http":
            return connection
        with connection:  # closed if the certificate is not right; otherwise the other socket has it
            connection.settimeout(_seconds_left(deadline))
            return rules.make_tls().wrap_socket(connection, server_hostname=target.host)
    raise error


def _resolve_within(target: _Target, rules: FetchRules, deadline: float) -> Sequence[str]:
    """Resolve a name, for which the system has no time limit, until the deadline.

    Raises:
        OSError: it cannot be resolved, or not in time.
    """
    future: Future[Sequence[str]] = Future()

    def run() -> None:
        """Resolve the name in a thread, which is left alone if it takes too long."""
        try:
            future.set_result(rules.resolve(target.host, target.port))
        except Exception as error:
            future.set_exception(error)

    Thread(target=run, daemon=True, name="resolver").start()
    return future.result(_seconds_left(deadline))


def _request(connection: socket.socket, target: _Target, deadline: float) -> HTTPResponse:
    """Ask for a target over a connection, and return the answer, of which the headers are read."""
    client = HTTPConnection(target.host, target.port)
    client.auto_open = 0  # it would resolve the name again
    timed: Any = _TimedSocket(connection, deadline)
    client.sock = timed
    client.request("GET", target.path, headers={"Host": target.netloc, **_HEADERS})
    return client.getresponse()


def _read_image(response: HTTPResponse, max_bytes: int) -> bytes:
    """Return the body of an answer.

    Raises:
        RecordError: it is no image, or too large.
    """
    if response.status != 200:
        raise RecordError(UNREACHABLE)
    if not _CONTENT_TYPES.fullmatch(response.headers.get_content_type()):
        raise RecordError("There is no image at the image's URL.")
    body = bytearray()
    while len(body) <= max_bytes:
        chunk = response.read(_CHUNK)
        if not chunk:
            return bytes(body)
        body += chunk
    raise RecordError(f"The image at the URL has more than {max_bytes:,} bytes.")


class _TimedSocket:
    """Have a socket's operations end by a deadline together; its own time limit is one for each of them."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection, self._deadline = connection, deadline

    def sendall(self, data: bytes) -> None:
        """Send bytes."""
        self._connection.settimeout(_seconds_left(self._deadline))
        self._connection.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return what reads from the socket."""
        return io.BufferedReader(_TimedReader(self._connection, self._deadline))

    def close(self) -> None:
        """Leave the socket open: whoever made the connection closes it, and the answer is read until then."""


class _TimedReader(io.RawIOBase):
    """Read from a socket until a deadline."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection, self._deadline = connection, deadline

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what is there, at least a byte unless it has ended."""
        self._connection.settimeout(_seconds_left(self._deadline))
        return self._connection.recv_into(buffer)


def _seconds_left(deadline: float) -> float:
    """Return the seconds until a deadline.

    Raises:
        TimeoutError: it is over.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds
