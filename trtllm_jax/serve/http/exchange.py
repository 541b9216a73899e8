"""One generating request from its submission to its end: watched, timed, counted."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager

from starlette.requests import Request
from starlette.types import Receive

from trtllm_jax.requests.outputs import RequestOutput
from trtllm_jax.requests.sampling_params import SamplingParams
from trtllm_jax.serve.http.errors import GONE, ApiError, as_api_error, checking, unavailable
from trtllm_jax.serve.server import Server

_GRACE = 5.0
"""Seconds that the engine has to end what ran out of time, or a client to take the rest."""


class Exchange:
    """What is known of a request while it is answered. Whatever ends it early ends its sequences at once.

    Attributes:
        id: of the answer.
        created: in seconds since 1970.
        outputs: one a prompt, once submitted.
        params: what is generated, None for nothing.
        gone: whether the client left.
        expired: whether it took too long.
    """

    def __init__(self, server: Server, request: Request, prefix: str) -> None:
        server.check_ready()
        self.server = server
        self.id = f"{prefix}{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.outputs: list[RequestOutput] = []
        self.params: SamplingParams | None = None
        self.gone = self.expired = False
        self._request = request
        self._began = time.perf_counter()

    async def submit(self, make: Callable[[], list[RequestOutput]], heavy: bool) -> None:
        """Have the requests made, in a thread where that takes long. ApiError where what they ask for is wrong."""

        def checked() -> list[RequestOutput]:
            with checking():
                return make()

        if not heavy:
            self.outputs = checked()
            return
        made = self.server.pool.submit(checked)
        try:
            self.outputs = await asyncio.wrap_future(made)
        except asyncio.CancelledError:
            made.add_done_callback(_abort_all)
            raise

    @asynccontextmanager
    async def guarded(self, receive: Receive) -> AsyncIterator[None]:
        """While in here, a client that leaves and time that runs out end the sequences; leaving here ends them too."""
        loop = asyncio.get_running_loop()
        limit = self.server.settings.request_timeout
        watcher = loop.create_task(self._until_gone(receive))
        timer = loop.call_later(limit, self._expire)
        status = 500
        try:
            async with asyncio.timeout(limit + _GRACE):
                yield
            status = 200
        except TimeoutError:
            status = 504
            raise self._timeout() from None
        except Exception as error:
            told = as_api_error(error, self.server.settings.retry_after)
            status = told.status if told else 500
            raise
        finally:
            timer.cancel()
            watcher.cancel()
            self._abort()
            self._count(status)

    def check(self) -> None:
        """ApiError where the answer is not what the client asked for, because it was ended early."""
        if self.gone:
            raise ApiError(GONE, "the client left")
        if self.expired:
            raise self._timeout()
        if any(answer.finish_reason == "cancelled" for output in self.outputs for answer in output.outputs):
            raise unavailable("the server is shutting down", self.server.settings.retry_after)

    def _timeout(self) -> ApiError:
        limit = self.server.settings.request_timeout
        return ApiError(504, f"the answer was not complete after {limit:g} s", code="timeout")

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._abort()

    def _expire(self) -> None:
        self.expired = True
        self._abort()

    def _abort(self) -> None:
        for output in self.outputs:
            if not output.finished:
                output.abort()

    def _count(self, status: int) -> None:
        answers = [(one.finish_reason or "cancelled", one.length) for output in self.outputs for one in output.outputs]
        prompt_tokens = sum(len(output.prompt_token_ids) for output in self.outputs)
        record = self._request.scope.get("trtllm_jax.record")
        if record is not None:
            record.update(
                id=self.id,
                prompt_tokens=prompt_tokens,
                generated_tokens=sum(tokens for _, tokens in answers),
                finished=",".join(dict.fromkeys(reason for reason, _ in answers)),
            )
        if self.server.tracing is not None:
            status = GONE if self.gone else status
            headers = self._request.headers
            self.server.tracing.record(self.id, headers, self._began, status, self.params, self.outputs)
        if status == 200:
            self.server.metrics.answered(time.perf_counter() - self._began, self.outputs)


def _abort_all(made: Future[list[RequestOutput]]) -> None:
    if made.exception() is None:
        for output in made.result():
            output.abort()


def submit_each(prompts: Sequence[object], make: Callable[[object], RequestOutput]) -> list[RequestOutput]:
    """The outputs of all prompts; if one is refused, none of them goes on."""
    outputs: list[RequestOutput] = []
    try:
        for prompt in prompts:
            outputs.append(make(prompt))
    except BaseException:
        for output in outputs:
            output.abort()
        raise
    return outputs
