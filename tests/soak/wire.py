"""HTTP by hand, for clients that do what no well-kept client library lets them do."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

SECONDS = 120.0
"""No answer takes longer, and no server keeps a silent client longer."""


def request(body: Any, path: str = "/v1/completions", *, close: bool = True) -> bytes:
    """A POST of `body`: JSON, unless it is bytes already."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    end = "Connection: close\r\n" if close else ""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n{end}\r\n"
    )
    return head.encode() + raw


class Connection:
    """One connection to the server; a context manager that cuts it."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)

    async def __aenter__(self) -> Connection:
        # A small window: who does not read soon stops the server from writing.
        self._reader, self._writer = await asyncio.open_connection(*self._address, limit=1 << 12)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._writer.transport.abort()

    async def send(self, data: bytes, *, piece: int | None = None, pause: float = 0.0) -> None:
        """All of it, in pieces of that many bytes with a pause after each."""
        for start in range(0, len(data), piece or len(data)):
            self._writer.write(data[start : start + (piece or len(data))])
            await self._writer.drain()
            await asyncio.sleep(pause)

    async def read_some(self, size: int = 1 << 12) -> bytes:
        """What is there; nothing at the connection's end."""
        async with asyncio.timeout(SECONDS):
            return await self._reader.read(size)

    async def measured(self) -> tuple[int, bytes]:
        """Status and body of an answer that says its length, after which the connection stays."""
        async with asyncio.timeout(SECONDS):
            head = await self._reader.readuntil(b"\r\n\r\n")
            (length,) = re.findall(rb"content-length: (\d+)", head.lower())
            return int(head.split(maxsplit=2)[1]), await self._reader.readexactly(int(length))

    async def answer(self) -> tuple[int, bytes]:
        """Status and body, read until the server closes; a chunked body is as it came."""
        data = b""
        while piece := await self.read_some(1 << 16):
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        return (int(head.split(maxsplit=2)[1]) if head else 0), body
