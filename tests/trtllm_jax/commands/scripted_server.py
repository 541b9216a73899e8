"""An OpenAI-like server whose answers a test scripts byte by byte."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

Behaviour = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


def http(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def event(record: Any) -> bytes:
    return b"data: " + (record if isinstance(record, bytes) else json.dumps(record).encode()) + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


async def answer_well(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """`max_tokens` tokens, an event each, and their usage where it is asked for."""
    tokens, chat = body["max_tokens"], "messages" in body
    writer.write(STREAM)
    if chat:
        writer.write(chunk(event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})))
    for i in range(tokens):
        last = {"finish_reason": "length" if i == tokens - 1 else None}
        choice = {"delta": {"content": f" {i}"}} if chat else {"text": f" {i}"}
        writer.write(chunk(event({"choices": [choice | last]})))
        await asyncio.sleep(0.001)
    if (body.get("stream_options") or {}).get("include_usage"):
        prompt = len(body["messages"][0]["content"] if chat else body["prompt"])
        usage = {"prompt_tokens": prompt, "completion_tokens": tokens}
        writer.write(chunk(event({"choices": [], "usage": usage})))
    writer.write(chunk(event(b"[DONE]")) + chunk(b""))


class ScriptedServer:
    """Listens on `port`; what it saw is in `heads`, `bodies`, `connections` and `most_at_once`."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = answer_well
        self.heads: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.connections = self.most_at_once = self._at_once = 0
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._connected, "localhost", 0), self._loop)
        self._server = started.result()
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.base_url = f"http://localhost:{self.port}/v1"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: Any = asyncio.current_task()
        self._tasks.add(task)
        self.connections += 1
        try:
            while not writer.is_closing():
                await self._answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET /v1/models "):
            writer.write(http("200 OK", b'{"data": [{"id": "first"}, {"id": "second"}]}'))
            return
        lengths = [line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length:")]
        body = json.loads(await reader.readexactly(int(lengths[0])))
        self.heads.append(head)
        self.bodies.append(body)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await self.behaviour(body, writer)
        finally:
            self._at_once -= 1

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            for task in [*self._tasks]:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
