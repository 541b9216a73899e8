"""An HTTP/1.1 client for many streams from one server, which records the time of bytes as soon as they arrive.

httptools parses. aiohttp, a general client, takes 1.7 times the processor time a token (docs/performance.md), and
passes the bytes to a task, which can record a time only when the event loop runs it.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools

from trtllm_jax.commands.bench.answer import RequestFailure

OnBody = Callable[[bytes, float], None]


@dataclass(frozen=True)
class Server:
    """The address of an OpenAI-compatible server; `path` is the prefix of every endpoint's path."""

    host: str
    port: int
    path: str = ""
    tls: bool = False
    api_key: str | None = None

    @classmethod
    def of(cls, base_url: str, api_key: str | None = None) -> "Server":
        """The server at a URL such as http://localhost:8000/v1; ValueError if the URL is invalid."""
        try:
            url = urlsplit(base_url)
            port = url.port
        except ValueError as error:
            raise ValueError(f"base_url = {base_url!r} is not a URL: {error}") from error
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise ValueError(
                f"base_url = {base_url!r} is not the URL of a server: write for example http://localhost:8000/v1"
            )
        for name, value in (("base_url", base_url), ("api_key", api_key or "")):
            if not value.isascii() or not value.isprintable() or " " in value:
                raise ValueError(f"{name} has a space or a character that HTTP does not allow: remove it")
        tls = url.scheme == "https"
        return cls(url.hostname, port or (443 if tls else 80), url.path.rstrip("/"), tls, api_key)

    def request_head(self, method: str, path: str, length: int) -> bytes:
        """The request line and headers of a request with `length` bytes of JSON."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.path}{path} HTTP/1.1", f"Host: {host}:{self.port}", "Accept: */*"]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        if length:
            lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        return "\r\n".join([*lines, "", ""]).encode()


class Client:
    """Sends requests to one server within one event loop, and reuses connections."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if server.tls else None

    async def request(self, method: str, path: str, body: bytes, on_body: OnBody) -> int:
        """Send a request, pass the answer's body to `on_body`, and return its status.

        If the server has closed an idle connection, the request is sent again on another one. RequestFailure if a
        connection cannot be opened or is lost.
        """
        while True:
            connection, kept = await self._connection()
            try:
                status = await connection.request(self.server.request_head(method, path, len(body)) + body, on_body)
            except ConnectionResetError as error:
                if not kept or connection.received:
                    raise RequestFailure("connection lost", "the server closed it before the answer ended") from error
            else:
                if connection.reusable:
                    self._idle.append(connection)
                return status
            finally:
                if not connection.reusable:
                    connection.abort()

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.abort()

    async def _connection(self) -> tuple["_Connection", bool]:
        while self._idle:
            if (kept := self._idle.pop()).reusable:
                return kept, True
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(_Connection, self.server.host, self.server.port, ssl=self._tls)
        except ConnectionRefusedError as error:
            raise RequestFailure("connection refused", f"{self.server.host}:{self.server.port}") from error
        except OSError as error:
            raise RequestFailure("no connection", str(error)) from error
        return connection, False


class _Connection(asyncio.Protocol):
    """One connection with one request at a time; the parser calls the methods named `on_`."""

    def __init__(self) -> None:
        self.received = False
        self.reusable = False
        self._transport: asyncio.Transport
        self._complete: asyncio.Future[int] | None = None

    async def request(self, request: bytes, on_body: OnBody) -> int:
        """The status of the complete answer; ConnectionResetError if it is cut off. Raises what `on_body` raises."""
        self.received = self.reusable = self._headers_complete = self._has_length = False
        self._on_body = on_body
        self._parser = httptools.HttpResponseParser(self)
        self._complete = asyncio.get_running_loop().create_future()
        if self._transport.is_closing():
            raise ConnectionResetError
        self._transport.write(request)
        return await self._complete

    def abort(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        if self._complete is None or self._complete.done():
            self.reusable = False  # the server sends bytes without a request
            return
        self.received = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._fail(error.__context__ or error)
        except httptools.HttpParserError as error:
            self._fail(RequestFailure("malformed HTTP", str(error)))

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        # A body without a length ends with its connection.
        if (
            self._complete
            and not self._complete.done()
            and error is None
            and self._headers_complete
            and not self._has_length
        ):
            self._complete.set_result(self._parser.get_status_code())
        self._fail(ConnectionResetError())

    def on_message_begin(self) -> None:
        self._headers_complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self._headers_complete = True

    def on_body(self, data: bytes) -> None:
        self._on_body(data, self._now)

    def on_message_complete(self) -> None:
        if self._complete and not self._complete.done():
            self.reusable = self._parser.should_keep_alive()
            self._complete.set_result(self._parser.get_status_code())

    def _fail(self, error: BaseException) -> None:
        if self._complete and not self._complete.done():
            self._complete.set_exception(error)
