"""Server-sent events: a response whose events cost little, and which never ends without a last event."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trtllm_jax.serve.http.errors import ApiError, as_api_error
from trtllm_jax.serve.http.json_response import as_json
from trtllm_jax.serve.http.tracker import RequestTracker

DONE = b"data: [DONE]\n\n"

_RESPONSE_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ],
}


class ChunkEncoder:
    """Encodes a stream's events: what they have in common once, and each choice between its two parts."""

    def __init__(self, head: Mapping[str, Any], usage: bool) -> None:
        self._before = b"data: " + as_json(head)[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if usage else b"]}\n\n"

    def encode(self, choice: bytes) -> bytes:
        """The event of a choice."""
        return self._before + choice + self._after

    def encode_with_usage(self, choice: bytes, usage: Mapping[str, Any]) -> bytes:
        """The event of a choice with the token counts; without a choice, the last event of a stream."""
        return self._before + choice + b'],"usage":' + as_json(usage) + b"}\n\n"


def _error_event(error: ApiError) -> bytes:
    return b"data: " + error.body() + b"\n\n"


class EventStream(Response):
    """Sends events as they come. The headers go out with the first event, so that an earlier failure has its status.

    Args:
        tracker: the request.
        events: encoded events; an exception of theirs ends the stream with an error event.
        last: the event that ends a complete stream.
        error_event: encodes the event that ends any other stream.
    """

    def __init__(
        self,
        tracker: RequestTracker,
        events: AsyncIterator[bytes],
        *,
        last: bytes = DONE,
        error_event: Callable[[ApiError], bytes] = _error_event,
    ) -> None:
        super().__init__()
        self._tracker = tracker
        self._events = events
        self._last = last
        self._encode_error = error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        started = False
        try:
            async with self._tracker.abort_on_disconnect(receive):
                async for event in self._events:
                    if not started:
                        started = True
                        await send(_RESPONSE_START)
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                self._tracker.raise_if_aborted()
            last = self._last
        except Exception as error:
            if not started:
                raise
            last = self._encode_error(self._api_error(scope, error))
        if not self._tracker.disconnected:
            await send({"type": "http.response.body", "body": last, "more_body": False})

    def _api_error(self, scope: Scope, error: Exception) -> ApiError:
        """The client's form of a failure, whose status the log line has although 200 was sent."""
        server = self._tracker.server
        api_error = as_api_error(error, server.settings.retry_after)
        if api_error is None:
            server.log_failure(scope, error)
            api_error = ApiError(500, "the server failed while it answered")
        scope.get("trtllm_jax.log_fields", {})["status"] = api_error.status
        return api_error


def merge_streams(streams: Sequence[AsyncIterator[bytes]]) -> AsyncIterator[bytes]:
    """The pieces of all streams as they come, those that are there together joined; the first failure ends all."""
    return streams[0] if len(streams) == 1 else _interleave(streams)


async def _interleave(streams: Sequence[AsyncIterator[bytes]]) -> AsyncIterator[bytes]:
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
