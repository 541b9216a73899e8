"""`RequestTracker`: a generating request from its submission to its end, with its timeout and its metrics."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.types import Receive

from trtllm_jax.requests.outputs import RequestOutput
from trtllm_jax.requests.sampling_params import SamplingParams
from trtllm_jax.serve.http.errors import (
    CLIENT_CLOSED_REQUEST,
    ApiError,
    as_api_error,
    bad_request_on_value_error,
    prompt_errors_name,
    service_unavailable,
)
from trtllm_jax.serve.server import Server
from trtllm_jax.serve.tracing import RequestSpan

_GRACE = 5.0
"""Seconds after the timeout in which the engine ends the request, or a client takes the rest of its answer."""


class RequestTracker:
    """The state of a request while it is answered. Whatever ends it early aborts its sequences at once.

    Attributes:
        id: the answer's id.
        created: when the request came, in seconds since 1970.
        outputs: one output a prompt, once the prompts are submitted.
        params: the sampling parameters, None where nothing is generated.
        disconnected: whether the client has closed the connection.
        timed_out: whether the request took longer than `request_timeout`.
    """

    def __init__(self, server: Server, request: Request, prefix: str) -> None:
        server.check_ready()
        self.server = server
        self.id = f"{prefix}{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.outputs: list[RequestOutput] = []
        self.params: SamplingParams | None = None
        self.disconnected = self.timed_out = False
        self._request = request
        self._started = time.perf_counter()

    async def submit(self, generate: Callable[[], list[RequestOutput]], in_thread: bool) -> None:
        """Submit the prompts by calling `generate`, in a thread where that takes long; ApiError for a wrong field."""

        def checked() -> list[RequestOutput]:
            with bad_request_on_value_error():
                return generate()

        if not in_thread:
            self.outputs = checked()
            return
        submitted = self.server.pool.submit(checked)
        try:
            self.outputs = await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_abort_all)
            raise

    def head(self, kind: str, model: str) -> dict[str, Any]:
        """The fields with which answers and events of completions and chats begin; `kind` is OpenAI's `object`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": model,
            "system_fingerprint": self.server.system_fingerprint,
        }

    @asynccontextmanager
    async def abort_on_disconnect(self, receive: Receive) -> AsyncIterator[None]:
        """A context that aborts the sequences when the client disconnects, when time runs out, and when it is left."""
        loop = asyncio.get_running_loop()
        limit = self.server.settings.request_timeout
        watcher = loop.create_task(self._watch_for_disconnect(receive))
        timer = loop.call_later(limit, self._on_timeout)
        status = 500
        try:
            async with asyncio.timeout(limit + _GRACE):
                yield
            status = 200
        except TimeoutError:
            status = 504
            raise self._timeout_error() from None
        except Exception as error:
            api_error = as_api_error(error, self.server.settings.retry_after)
            status = api_error.status if api_error else 500
            raise
        finally:
            timer.cancel()
            watcher.cancel()
            self._abort()
            self._record(status)

    def raise_if_aborted(self) -> None:
        """ApiError where the sequences were aborted, so that the answer is not complete."""
        if self.disconnected:
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client left")
        if self.timed_out:
            raise self._timeout_error()
        if any(answer.finish_reason == "cancelled" for output in self.outputs for answer in output.outputs):
            raise service_unavailable("the server is shutting down", self.server.settings.retry_after)

    def _timeout_error(self) -> ApiError:
        limit = self.server.settings.request_timeout
        return ApiError(504, f"the answer was not complete after {limit:g} s", code="timeout")

    async def _watch_for_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.disconnected = True
        self._abort()

    def _on_timeout(self) -> None:
        self.timed_out = True
        self._abort()

    def _abort(self) -> None:
        for output in self.outputs:
            if not output.finished:
                output.abort()

    def _record(self, status: int) -> None:
        answers = [(one.finish_reason or "cancelled", one.length) for output in self.outputs for one in output.outputs]
        prompt_tokens = sum(len(output.prompt_token_ids) for output in self.outputs)
        log_fields = self._request.scope.get("trtllm_jax.log_fields")
        if log_fields is not None:
            log_fields.update(
                id=self.id,
                prompt_tokens=prompt_tokens,
                generated_tokens=sum(tokens for _, tokens in answers),
                finished=",".join(dict.fromkeys(reason for reason, _ in answers)),
            )
        if self.server.tracing is not None:
            span = RequestSpan(
                request_id=self.id,
                headers=self._request.headers,
                started=self._started,
                status=CLIENT_CLOSED_REQUEST if self.disconnected else status,
                params=self.params,
                outputs=self.outputs,
            )
            self.server.tracing.export(span)
        if status == 200:
            self.server.metrics.record_success(time.perf_counter() - self._started, self.outputs)


def _abort_all(submitted: Future[list[RequestOutput]]) -> None:
    if submitted.exception() is None:
        for output in submitted.result():
            output.abort()


def submit_each(
    prompts: Sequence[object], names: Sequence[str | Mapping[str, str]], generate: Callable[[object], RequestOutput]
) -> list[RequestOutput]:
    """The outputs of all prompts; where one is refused, the others are aborted, and the ApiError names it.

    `names` are what the request calls each prompt; of a pair of texts, what it calls the parts that errors may name.
    """
    outputs: list[RequestOutput] = []
    try:
        for prompt, name in zip(prompts, names, strict=True):
            with prompt_errors_name({"prompt": name} if isinstance(name, str) else name), bad_request_on_value_error():
                outputs.append(generate(prompt))
    except BaseException:
        for output in outputs:
            output.abort()
        raise
    return outputs
