"""Server-sent events: a response that costs little an event, and never ends without saying so."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trtllm_jax.serve.http.errors import ApiError, as_api_error
from trtllm_jax.serve.http.exchange import Exchange

DONE = b"data: [DONE]\n\n"

as_json = msgspec.json.Encoder().encode

_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ],
}


class Envelope:
    """What all events of a stream have in common, encoded once; a choice's bytes go in the middle."""

    def __init__(self, head: Mapping[str, Any], usage: bool) -> None:
        self._before = b"data: " + as_json(head)[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if usage else b"]}\n\n"

    def around(self, choice: bytes) -> bytes:
        """The event."""
        return self._before + choice + self._after

    def with_usage(self, choice: bytes, usage: Mapping[str, Any]) -> bytes:
        """The event that tells the tokens so far; without a choice, the last one of a stream."""
        return self._before + choice + b'],"usage":' + as_json(usage) + b"}\n\n"


def _failure(error: ApiError) -> bytes:
    return b"data: " + error.body() + b"\n\n"


class EventStream(Response):
    """Sends events as they come. Headers go out with the first, so that a request refused until then has its status.

    Args:
        exchange: what is answered.
        events: whole events; what they raise ends the stream with an event that tells it.
        last: what ends a stream that is whole.
        failure: the event of what ended it otherwise.
    """

    def __init__(
        self,
        exchange: Exchange,
        events: AsyncIterator[bytes],
        *,
        last: bytes = DONE,
        failure: Callable[[ApiError], bytes] = _failure,
    ) -> None:
        super().__init__()
        self._exchange = exchange
        self._events = events
        self._last = last
        self._failure = failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        started = False
        try:
            async with self._exchange.guarded(receive):
                async for event in self._events:
                    if not started:
                        started = True
                        await send(_START)
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                self._exchange.check()
            last = self._last
        except Exception as error:
            if not started:
                raise
            told = as_api_error(error, self._exchange.server.settings.retry_after)
            if told is None:
                self._exchange.server.log_failure(scope, error)
                told = ApiError(500, "the server failed while it answered")
            scope.get("trtllm_jax.record", {})["status"] = told.status
            last = self._failure(told)
        if not self._exchange.gone:
            await send({"type": "http.response.body", "body": last, "more_body": False})


def merged(streams: Sequence[AsyncIterator[bytes]]) -> AsyncIterator[bytes]:
    """What all streams give, as it comes; what is there at once is one piece. The first failure ends all."""
    return streams[0] if len(streams) == 1 else _merge(streams)


async def _merge(streams: Sequence[AsyncIterator[bytes]]) -> AsyncIterator[bytes]:
    queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()

    async def pump(stream: AsyncIterator[bytes]) -> None:
        try:
            async for piece in stream:
                queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(stream)) for stream in streams]
    try:
        ended = 0
        while ended < len(tasks):
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            pieces = [item for item in items if isinstance(item, bytes)]
            if pieces:
                yield b"".join(pieces)
            for item in items:
                if isinstance(item, BaseException):
                    raise item
            ended += items.count(None)
    finally:
        for task in tasks:
            task.cancel()
