"""The results of requests, with TensorRT-LLM's names: they can be waited for, awaited and iterated."""

import asyncio
import contextlib
import copy
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from trtllm_jax.engine.logit_edits import Logits
from trtllm_jax.engine.request import Admission, Embedding


@dataclass(frozen=True)
class Logprob:
    """The log-probability of one token at one position, and its rank there (1 is the likeliest)."""

    logprob: float
    rank: int | None = None


class Delta(NamedTuple):
    """What one of a request's n sequences gained since the last delivery."""

    sequence: int
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[dict[int, Logprob]] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: BaseException | None = None
    end: tuple[int, dict[int, Logprob]] | None = None
    outputs: Mapping[str, Sequence[Any]] = {}
    """The optional outputs that were requested, by name."""


@dataclass(frozen=True)
class EncoderOutput:
    """What a classifier says of one text or pair of texts.

    Attributes:
        logits: of the classes, float32 [labels].
        prompt_token_ids: the ids.
        prompt: the text, the first one of a pair; None if token ids were given.
    """

    logits: Logits
    prompt_token_ids: list[int]
    prompt: str | None = None


@dataclass
class CompletionOutput:
    """One of the n sequences generated for a prompt; the `_diff` properties hold what the last step added.

    Attributes:
        index: 0 to n - 1.
        text: the generated text; without the stop string or token, unless include_stop_str_in_output is set.
        token_ids: the generated ids.
        cumulative_logprob: the sum of the ids' log-probabilities; None unless `logprobs` was requested.
        logprobs: for each id, the requested number of likeliest ids, and always the id itself.
        prompt_logprobs: for each id of the prompt, the requested number of likeliest ids after it, and always the id
            that follows it; in the last entry that is the first generated id.
        finish_reason: "stop", "length" or "cancelled"; None while the sequence runs.
        stop_reason: the stop string, or the id of stop_token_ids, that ended it; None for the end-of-sequence id.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    _prompt_tokens: int = field(default=0, repr=False)
    _seen_text: int = field(default=0, repr=False)
    _seen_tokens: int = field(default=0, repr=False)
    _seen_logprobs: int = field(default=0, repr=False)
    _logits: list[Logits] = field(default_factory=list, repr=False, compare=False)
    _end: tuple[int, dict[int, Logprob]] | None = field(default=None, repr=False, compare=False)

    @property
    def end_logprobs(self) -> tuple[int, dict[int, Logprob]] | None:
        """The ending id that `token_ids` lacks, with its log-probabilities; None without one, or if not requested."""
        return self._end

    @property
    def length(self) -> int:
        """The number of ids generated so far."""
        return len(self.token_ids) - self._prompt_tokens

    @property
    def generation_logits(self) -> Logits | None:
        """The model's logits for each generated id, before any edit: float32 [ids, vocab]; None if not requested."""
        return _joined(self._logits)

    @property
    def text_diff(self) -> str:
        """The text that the last step added."""
        return self.text[self._seen_text :]

    @property
    def token_ids_diff(self) -> list[int]:
        """The ids that the last step added."""
        return self.token_ids[self._seen_tokens :]

    @property
    def logprobs_diff(self) -> list[dict[int, Logprob]]:
        """The log-probabilities that the last step added."""
        return self.logprobs[self._seen_logprobs :]

    def _copied(self) -> "CompletionOutput":
        """A copy that shares no list with this object."""
        lists: dict[str, Any] = {name: list(value) for name, value in vars(self).items() if isinstance(value, list)}
        return replace(self, **lists)

    def _begin_step(self) -> None:
        self._seen_text, self._seen_tokens = len(self.text), len(self.token_ids)
        self._seen_logprobs = len(self.logprobs)

    def _add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        for token, alternatives in zip(delta.token_ids, delta.logprobs, strict=False):
            self.logprobs.append(alternatives)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + alternatives[token].logprob
        if delta.outputs:
            self.prompt_logprobs += delta.outputs.get("prompt_logprobs", ())
            self._logits += [logits[None] for logits in delta.outputs.get("generation_logits", ())]
        self._end = delta.end


class RequestOutput:
    """The result of one prompt, updated when it is waited for, awaited or iterated.

    `result()` and `await` return the finished output. Iterating, with `for` or `async for`, yields this same object
    after every step that added something, until it is finished. `copy` and `pickle` take a snapshot: a copy of an
    unfinished output is not updated further.

    Attributes:
        request_id: numbers the requests of one LLM, from 1.
        prompt: the text; None if token ids were given.
        prompt_token_ids: the ids.
        outputs: the n sequences; with best_of the n likeliest, best first.
        finished: whether all sequences have ended.
        cached_tokens: the number of prompt tokens found in the prefix cache; known with the first token.
        embedding: the prompt's embedding, float32 [embed]; a classifier's logits; None if the prompt was continued.
        error: the message of the failure that ended the request, if any; `result()` and iteration raise the failure.
    """

    def __init__(
        self,
        request_id: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        sequences: int,
        abort: Callable[[], object],
        *,
        before_waiting: Callable[[], object] = lambda: None,
        keep: int | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.outputs = [CompletionOutput(index) for index in range(sequences)]
        self._keep = sequences if keep is None else keep
        self._context: list[Logits] = []
        self.finished = False
        self.cached_tokens = 0
        self.embedding: Embedding | None = None
        self._start_time = time.perf_counter()
        self._queue_time: float | None = None
        self._first_token_time: float | None = None
        self._last_token_time: float | None = None
        self.error: str | None = None
        self._abort = abort
        self._before_waiting = before_waiting
        self._aborted = False
        self._failure: BaseException | None = None
        self._arrived: list[Delta] = []
        # Taking the plain lock is faster than taking the condition, and no thread waits for most outputs.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._blocked = 0
        self._wakers: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._iterated_to_end = False

    @property
    def context_logits(self) -> Logits | None:
        """The model's logits after each id of the prompt: float32 [prompt, vocab]; None if not requested."""
        return _joined(self._context)

    @property
    def metrics_dict(self) -> dict[str, float]:
        """Latencies in seconds, by TensorRT-LLM's names; those not known yet are left out.

        `request_queue_time` is the time in the engine until the request was admitted. `ttft` and `e2e` are the times
        to the first and to the last token, until they are detokenised. `tpot` is the mean time between tokens of the
        longest answer.
        """
        found = {} if self._queue_time is None else {"request_queue_time": self._queue_time}
        if self._first_token_time is not None:
            found["ttft"] = self._first_token_time - self._start_time
        if self.finished and self._last_token_time is not None:
            found["e2e"] = self._last_token_time - self._start_time
            most = max((output.length for output in self.outputs), default=0)
            if self._first_token_time is not None and most > 1:
                found["tpot"] = (self._last_token_time - self._first_token_time) / (most - 1)
        return found

    def result(self, timeout: float | None = None) -> "RequestOutput":
        """This output once it is finished. TimeoutError after `timeout` seconds; the request then still runs."""
        if not self._block(self._is_complete, timeout):
            raise TimeoutError(f"request {self.request_id} is not finished after {timeout} s; it still runs")
        return self._take_step()

    async def aresult(self) -> "RequestOutput":
        """This output once it is finished."""
        while not self._is_complete():
            await self._next_delta(self._is_complete)
        return self._take_step()

    def abort(self) -> None:
        """End the request soon with the finish reason "cancelled"; it keeps what it has generated."""
        self._aborted = True
        self._abort()

    def aborted(self) -> bool:
        """Whether `abort` was called."""
        return self._aborted

    def __await__(self) -> Generator[Any, None, "RequestOutput"]:
        return self.aresult().__await__()

    def __iter__(self) -> Iterator["RequestOutput"]:
        return self

    def __next__(self) -> "RequestOutput":
        if self._iterated_to_end:
            raise StopIteration
        self._block(self._has_update)
        return self._next_step()

    def __aiter__(self) -> AsyncIterator["RequestOutput"]:
        return self

    async def __anext__(self) -> "RequestOutput":
        if self._iterated_to_end:
            raise StopAsyncIteration
        while not self._has_update():
            await self._next_delta(self._has_update)
        return self._next_step()

    def __getstate__(self) -> dict[str, Any]:
        # Under the lock, so that a delta is either in the outputs or still pending, and never both.
        with self._lock:
            state = self.__dict__ | {
                "prompt_token_ids": list(self.prompt_token_ids),
                "outputs": [output._copied() for output in self.outputs],
                "_context": list(self._context),
                "_arrived": list(self._arrived),
            }
        for name in ("_abort", "_before_waiting", "_lock", "_changed", "_blocked", "_wakers"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._abort, self._before_waiting = _no_op, self._refuse_to_wait
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._blocked, self._wakers = 0, []

    def _refuse_to_wait(self) -> None:
        raise RuntimeError(
            f"this is a copy of request {self.request_id}, made before it was finished, and is not updated: wait for "
            "the original"
        )

    def __repr__(self) -> str:
        return (
            f"RequestOutput(request_id={self.request_id}, prompt={self.prompt!r}, "
            f"prompt_token_ids={self.prompt_token_ids}, outputs={self.outputs}, finished={self.finished})"
        )

    def _prepend_prompt(self, token_ids: Sequence[int], text: str) -> None:
        """Put the prompt before the answer of every sequence."""
        for output in self.outputs:
            output.token_ids, output.text, output._prompt_tokens = list(token_ids), text, len(token_ids)

    def _note_start(self, admission: Admission | None) -> None:
        """Record the time and the admission of a sequence's first token."""
        if self._first_token_time is None:
            self._first_token_time = time.perf_counter()
            if admission is not None:
                self.cached_tokens, self._queue_time = admission

    def _note_end(self) -> None:
        """Record the time at which a sequence ended."""
        self._last_token_time = time.perf_counter()

    def _deliver(self, delta: Delta) -> None:
        """Add a delta and wake the waiters; called by the output thread, or by a `RemoteLLM`'s event loop."""
        with self._lock:
            self._arrived.append(delta)
            if self._blocked:
                self._changed.notify_all()
            wakers, self._wakers = self._wakers, []
        for thread, loop, waker in wakers:
            if thread == threading.get_ident():
                _wake(waker)
            else:
                with contextlib.suppress(RuntimeError):  # the loop was closed, so no task waits in it
                    loop.call_soon_threadsafe(_wake, waker)

    def _has_update(self) -> bool:
        return bool(self._arrived) or self.finished or self._failure is not None

    def _is_complete(self) -> bool:
        if self.finished or any(delta.error for delta in self._arrived):
            return True
        ended = {delta.sequence for delta in self._arrived if delta.finish_reason}
        return all(output.finish_reason or output.index in ended for output in self.outputs)

    async def _next_delta(self, ready: Callable[[], bool]) -> None:
        self._before_waiting()
        loop = asyncio.get_running_loop()
        waker = loop.create_future()
        with self._lock:
            if ready():
                return
            self._wakers.append((threading.get_ident(), loop, waker))
        await waker

    def _block(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Block this thread until `ready`; False after `timeout` seconds."""
        if ready():
            return True
        self._before_waiting()
        with self._lock:
            self._blocked += 1
            try:
                return self._changed.wait_for(ready, timeout)
            finally:
                self._blocked -= 1

    def _next_step(self) -> "RequestOutput":
        self._take_step()
        self._iterated_to_end = self.finished
        return self

    def _take_step(self) -> "RequestOutput":
        """Apply all pending deltas; raises the failure that ended the request, if any."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
            if arrived:
                for output in self.outputs:
                    output._begin_step()
            for delta in arrived:
                self.outputs[delta.sequence]._add(delta)
                self._failure = self._failure or delta.error
                self._context += [logits[None] for logits in delta.outputs.get("context_logits", ())]
                for embedding in delta.outputs.get("embedding", ()):
                    self.embedding = embedding
            self.finished = self.finished or all(output.finish_reason for output in self.outputs)
            if self._failure is not None:
                self.error, self.finished = str(self._failure), True
                raise _copied(self._failure)
            if self.finished and len(self.outputs) > self._keep:
                self._keep_best()
        return self

    def _keep_best(self) -> None:
        self.outputs.sort(key=lambda output: -(output.cumulative_logprob or 0.0))
        del self.outputs[self._keep :]
        for index, output in enumerate(self.outputs):
            output.index = index


def _copied(failure: BaseException) -> BaseException:
    """A copy of the failure to raise: raising the stored one would add frames, which refer back to the result."""
    try:
        copied = copy.copy(failure)
    except Exception:  # an exception whose `args` its constructor does not accept
        return failure
    copied.__cause__ = failure.__cause__
    return copied.with_traceback(failure.__traceback__)


def _no_op() -> None:
    """The `abort` of a copy, which has no request to end."""


def _wake(waker: "asyncio.Future[None]") -> None:
    if not waker.done():  # the waiting task may have been cancelled
        waker.set_result(None)


def _joined(parts: list[Logits]) -> Logits | None:
    """The concatenation of `parts`, [..., vocab], with which it replaces them; None if there are none."""
    if len(parts) > 1:
        parts[:] = [np.concatenate(parts)]
    return parts[0] if parts else None


def vectors_of(outputs: Sequence[RequestOutput]) -> list[Embedding]:
    """The vector of each finished output. RuntimeError where a shutdown has cancelled one."""
    vectors = [output.embedding for output in outputs if output.embedding is not None]
    if len(vectors) < len(outputs):
        raise RuntimeError("LLM is shutting down")
    return vectors
