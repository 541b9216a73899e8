"""uvicorn's connection with limits that it lacks: for clients that send slowly or endlessly, or never read."""

import asyncio
import resource

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from trtllm_jax.serve.http.errors import service_unavailable

HEADER_TIMEOUT = 30.0
"""Seconds from a connection's start, or an answer's end, to the end of the next request's headers."""
MAX_HEADER_BYTES = 64 << 10
"""Bytes of a request's line and headers, not counting the chunk that arrives with their end."""
WRITE_TIMEOUT = 120.0
"""Seconds for a client to read what was written to it."""
RESERVED_FILES = 64
"""Open files that are left for a frontend's other files, and for connections that are being refused."""

_FULL = service_unavailable("the server has as many connections as it can hold", 1).body()
_CONNECTIONS_EXHAUSTED = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n" % len(_FULL)
) + _FULL
_HEADERS_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n"
    b"content-type: text/plain\r\n\r\n"
)


def connection_limit() -> int:
    """How many connections this process can hold, after raising its limit of open files as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = LimitedHttpProtocol.max_connections
    limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return max(limit, soft) - RESERVED_FILES


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol, which no client can occupy by silence or by a trickle of bytes.

    A connection that exceeds one of the timeouts above is closed, and its request ends as if the client had
    disconnected. Longer headers are answered with 431, and connections beyond `max_connections` with 503.
    """

    max_connections = 1 << 16
    """Connections that this process holds at once."""

    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _in_headers = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout of the first request's headers."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.write(_CONNECTIONS_EXHAUSTED)
            self._close()
        else:
            self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timeouts."""
        super().connection_lost(exc)
        self._stop_header_timer()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse, and count the bytes of headers that have not ended."""
        # The chunk in which a later request begins does not count: it may hold the end of a body as well.
        counted = len(data) if self._in_headers else 0
        super().data_received(data)
        if not self._in_headers:
            return
        self._header_bytes += counted
        if self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.transport.write(_HEADERS_TOO_LARGE)
            self._close()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_headers = True

    def on_headers_complete(self) -> None:
        """Stop the timeout of the headers."""
        self._header_bytes, self._in_headers = 0, False
        self._stop_header_timer()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Start the timeout of the next request's headers, unless that request has come already."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._start_header_timer()

    def pause_writing(self) -> None:
        """Start the timeout of a client that does not read."""
        super().pause_writing()
        self._write_timer = self._write_timer or self.loop.call_later(WRITE_TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timeout of a client that reads again."""
        super().resume_writing()
        if self._write_timer:
            self._write_timer.cancel()
            self._write_timer = None

    def _start_header_timer(self) -> None:
        self._stop_header_timer()
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT, self._close)

    def _stop_header_timer(self) -> None:
        if self._header_timer:
            self._header_timer.cancel()
            self._header_timer = None

    def _close(self) -> None:
        # A client that does not read would keep the connection open for what is still to be written.
        self.transport.close()
        self._header_timer = self.loop.call_later(WRITE_TIMEOUT, self.transport.abort)
