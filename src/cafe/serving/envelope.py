"""What surrounds every answer: its id, its security headers, its place in the metrics, and the last resort."""

import asyncio
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cafe.serving.errors import describe_error
from cafe.serving.metrics import Metrics

REQUEST_ID = "X-Request-Id"
SEND_SECONDS = 60.0  # for which a client may leave a piece of its answer unread
_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# Nothing is loaded from elsewhere, and no other site shows or reads what is here.
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


CLIENT_GONE = 499  # a status for the metrics, which nobody receives


class SlowReaderError(Exception):
    """Report that a client does not read its answer, which ends it."""


class Envelope:
    """Give each request an id, and each answer its headers; answer what nothing else caught.

    Args:
        app: what answers.
        metrics: count and time the answers.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _choose_id(Headers(scope=scope).get(REQUEST_ID, ""))
        scope["cafe.request_id"] = request_id
        started, status = time.monotonic(), 0

        async def send_with_headers(message: Message) -> None:
            """Add the headers to the beginning of an answer."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await send(message)
            except TimeoutError:
                raise SlowReaderError from None

        try:
            await self.app(scope, receive, send_with_headers)
        except SlowReaderError:
            status = CLIENT_GONE
        except Exception as error:
            # Where the answer has begun already, the connection is closed in its midst.
            answer = describe_error(error, request_id).response()
            if not status:
                await answer(scope, receive, send_with_headers)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # the pattern, of which there are few
            self.metrics.requests.labels(route, str(status or CLIENT_GONE)).inc()
            self.metrics.request_seconds.labels(route).observe(time.monotonic() - started)


def _choose_id(sent: str) -> str:
    """Return the id that a client sent, or a new one if it sent none that is safe to print."""
    return sent if _VALID_ID.fullmatch(sent) else secrets.token_hex(12)
