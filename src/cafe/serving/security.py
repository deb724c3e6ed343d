"""Who may ask, and how large a question may be. Checked for every request before anything else reads it."""

import asyncio
import hmac
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cafe.serving.config import RequestLimits, ServingConfig
from cafe.serving.errors import ApiError
from cafe.serving.public_addresses import is_address

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
WILDCARDS = frozenset({"0.0.0.0", "::"})

# What anyone may read, with GET: whether the server is well, and the page, which asks its user for the key.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/favicon.ico"})
OPEN_FOLDER = "/page/"

DRAIN_SECONDS = 1.0  # for which the rest of a refused body is read, so that the client gets to read the answer


MAX_BODIES = 8  # bodies of the largest size that are held at once; many more smaller ones


@dataclass
class ServerLoad:
    """Count what a server holds at the moment.

    Attributes:
        requests: with a body, that are being answered.
        num_bytes: of their bodies.
        is_stopping: nothing more is taken.
    """

    requests: int = 0
    num_bytes: int = 0
    is_stopping: bool = False


@dataclass
class Gate:
    """Let requests through that may be answered.

    Attributes:
        app: what answers them.
        config: what is allowed.
        load: of the server.
    """

    app: ASGIApp
    config: ServingConfig
    load: ServerLoad

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a WebSocket
        headers = Headers(scope=scope)
        try:
            check_host(headers, self.config)
            check_origin(headers, self.config)
            check_key(scope, headers, self.config.api_key)
            check_stopping(scope, self.load)
            check_body_headers(scope, headers, self.config.limits.max_body_bytes)
        except ApiError as error:
            await _refuse(error, receive, send)
            return
        if scope["method"] == "POST":
            await self._answer(scope, receive, send)
        else:
            await self.app(scope, _replay(b"", receive), send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with a body, or refuse it if the server holds too much already."""
        # Whatever else waits, for a thread or for an image to be decoded, is bounded by this.
        most = self.config.engine.max_waiting + self.config.engine.max_chats
        self.load.requests += 1
        held = 0

        def hold(num_bytes: int) -> None:
            """Count bytes of the body."""
            nonlocal held
            held += num_bytes
            self.load.num_bytes += num_bytes
            if self.load.num_bytes > MAX_BODIES * self.config.limits.max_body_bytes:
                raise _overloaded()

        try:
            if self.load.requests > most:
                raise _overloaded()
            body = await read_body(receive, self.config.limits, hold)
            if body is not None:  # the client is still there
                await self.app(scope, _replay(body, receive), send)
        except ApiError as error:
            await _refuse(error, receive, send)
        finally:
            self.load.requests -= 1
            self.load.num_bytes -= held


def is_loopback(host: str) -> bool:
    """Tell whether a server that is bound to a host is reached from this machine alone."""
    if host.lower() in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(headers: Headers, config: ServingConfig) -> None:
    """Make sure that a request means this server: a page elsewhere may have had its name lead here (DNS rebinding).

    Raises:
        ApiError: the `Host` header names another server.
    """
    name = _hostname(headers.get("host", ""))
    if name in LOOPBACK_NAMES | {config.host.lower(), *map(str.lower, config.allowed_hosts)}:
        return
    # A server on all addresses is called by any of them. No page can make an address lead elsewhere.
    if config.host in WILDCARDS and is_address(name):
        return
    raise ApiError(403, "host_not_allowed", "The Host header is none of this server's names: see --allowed-host.")


def check_origin(headers: Headers, config: ServingConfig) -> None:
    """Make sure that a request that a browser sends comes from this server's own page.

    Raises:
        ApiError: it comes from another.
    """
    origin = headers.get("origin")
    if origin is None:
        return
    netloc = origin.lower().partition("://")[2]
    is_own = origin.lower().startswith(("http://", "https://")) and netloc == headers.get("host", "").lower()
    if is_own or _hostname(netloc) in map(str.lower, config.allowed_hosts):
        return
    raise ApiError(403, "origin_not_allowed", "The request comes from another site: see --allowed-host.")


def check_key(scope: Scope, headers: Headers, api_key: str) -> None:
    """Make sure that a request has the server's key, if there is one and the address is not open to all.

    Raises:
        ApiError: it has none, or another.
    """
    path = scope["path"]
    is_open = scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(OPEN_FOLDER))
    if not api_key or is_open:
        return
    scheme, _, sent = headers.get("authorization", "").partition(" ")
    # Headers are bytes, which Starlette reads as Latin-1.
    is_equal = hmac.compare_digest(sent.strip().encode("latin-1"), api_key.encode())
    if scheme.lower() == "bearer" and is_equal:
        return
    challenge = {"WWW-Authenticate": "Bearer"}
    raise ApiError(401, "invalid_api_key", "The Authorization header has no valid key.", headers=challenge)


def check_stopping(scope: Scope, load: ServerLoad) -> None:
    """Refuse new work while the server finishes what it took.

    Raises:
        ApiError: the server is stopping.
    """
    if load.is_stopping and scope["path"] not in ("/health", "/metrics"):
        raise ApiError(503, "not_ready", "The server is stopping.", headers={"Retry-After": "5"})


def check_body_headers(scope: Scope, headers: Headers, max_bytes: int) -> None:
    """Make sure that a body is JSON, is not compressed and is not too large, by what the headers say.

    Raises:
        ApiError: it is not.
    """
    if int(headers.get("content-length", "0")) > max_bytes:
        raise _too_large(max_bytes)
    if scope["method"] != "POST":  # no address takes another body
        return
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "unsupported_media_type", "The body should be JSON, with Content-Type: application/json.")
    # A few compressed bytes can become gigabytes.
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "unsupported_encoding", "The body should not be compressed.")


async def read_body(receive: Receive, limits: RequestLimits, hold: Callable[[int], None]) -> bytes | None:
    """Read the body of a request; None if the client goes away meanwhile.

    Args:
        receive: of the request.
        limits: of its size and its time.
        hold: is called with the number of bytes of each piece, and may refuse them.

    Raises:
        ApiError: it is too large, or too slow.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                piece = message.get("body", b"")
                body += piece
                if len(body) > limits.max_body_bytes:
                    raise _too_large(limits.max_body_bytes)
                hold(len(piece))
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        text = f"The body did not arrive within {limits.body_timeout:g} seconds."
        raise ApiError(408, "body_timeout", text) from None


def _too_large(max_bytes: int) -> ApiError:
    """Return the error of a body that is too large."""
    return ApiError(413, "body_too_large", f"The body has more than {max_bytes:,} bytes.")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the whole body at once, and then waits for the client to go."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        """Receive the next message."""
        return messages.pop() if messages else await receive()

    return replay


def _overloaded() -> ApiError:
    """Return the error of a request for which there is no room."""
    return ApiError(429, "overloaded", "The server is busy: try again later.", headers={"Retry-After": "1"})


async def _refuse(error: ApiError, receive: Receive, send: Send) -> None:
    """Answer with an error, and close the connection, on which the rest of the body may still come."""
    response = error.response()
    headers = [*response.raw_headers, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    # HEAD has no body; the server leaves it out.
    await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
    # A connection that is closed with bytes unread is reset, and then the client may not get to read the answer.
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while (message := await receive()).get("more_body", False):
                del message
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b""})


def _hostname(netloc: str) -> str:
    """Return the name of a host without its port and without an IPv6 address's brackets; empty if it is none."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").removesuffix(".")
    except ValueError:
        return ""
