"""Connections that are closed if the headers of a request do not come: they would be kept open for nothing."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # for the headers of a request, from its first byte or from the beginning of the connection


class Connection(H11Protocol):
    """Speak HTTP/1.1 with a client that sends its headers in time."""

    header_seconds = HEADER_SECONDS
    _headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """Take a piece of a request."""
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        if self._headers_due:
            self._headers_due.cancel()

    def _watch_headers(self) -> None:
        """Begin to wait for headers that have not come, and stop once they have."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if self.conn.their_state is not h11.IDLE or is_answering:
            if self._headers_due:
                self._headers_due.cancel()
            self._headers_due = None
        elif self._headers_due is None:  # each byte that comes late does not buy more time
            self._headers_due = self.loop.call_later(self.header_seconds, self.transport.close)
