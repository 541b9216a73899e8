"""A client's connection with the limits that uvicorn leaves out: for who sends slowly or endlessly, or never reads."""

import asyncio
import resource

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from trtllm_jax.serve.http.errors import unavailable

HEAD_SECONDS = 30.0
"""From a connection's start, or an answer's end, to the end of the next request's headers."""
HEAD_BYTES = 64 << 10
"""Most that a request's line and headers may have, before the piece that arrives with their end."""
STALL_SECONDS = 120.0
"""For a client to take what was written to it."""
OTHER_FILES = 64
"""Open files of a frontend that are no connections, and connections that are just being refused."""

_FULL = unavailable("the server has as many connections as it can hold", 1).body()
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n" % len(_FULL)
) + _FULL
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n"
    b"content-type: text/plain\r\n\r\n"
)


def room_for_connections() -> int:
    """How many connections this process may hold, once it may open as many files as the system ever lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = BoundedConnection.most if hard == resource.RLIM_INFINITY else min(hard, BoundedConnection.most)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(most, soft) - OTHER_FILES


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol, which a client can keep neither by silence nor by trickles of bytes.

    A connection that runs into one of the times above is closed; what it was answering is ended, as if the client had
    left. Longer headers are answered with 431, and connections beyond `most` with 503, unasked.
    """

    most = 1 << 16
    """Connections of this process."""

    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _head = 0
    _in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request's time begins."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(_TOO_MANY)
            self._close()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """No more time is kept."""
        super().connection_lost(exc)
        self._cancel()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse, and count what belongs to headers that do not end."""
        # The chunk in which a later request begins is not: it may hold the end of a body, too.
        counted = len(data) if self._in_head else 0
        super().data_received(data)
        if not self._in_head:
            return
        self._head += counted
        if self._head > HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self._close()

    def on_message_begin(self) -> None:
        """A request's line begins."""
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        """A request is known."""
        self._head, self._in_head = 0, False
        self._cancel()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """The next request's time begins, unless it is there already."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._await_head()

    def pause_writing(self) -> None:
        """The client does not read: it has a while to begin."""
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads."""
        super().resume_writing()
        if self._stalled:
            self._stalled.cancel()
            self._stalled = None

    def _await_head(self) -> None:
        self._cancel()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._close)

    def _cancel(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        # A client that does not read would keep what is still to be written, and with it the connection.
        self.transport.close()
        self._timer = self.loop.call_later(STALL_SECONDS, self.transport.abort)
