"""`RemoteLLM`: an `LLM` that sends its sequences to an engine in another process; imports no jax."""

import asyncio
import contextlib
import itertools
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from checkpoints.checkpoint import open_checkpoint
from trtllm_jax.common.errors import EngineDeadError
from trtllm_jax.engine.request import Admission, FinishReason, Request, Update
from trtllm_jax.llmapi.base_llm import BaseLLM
from trtllm_jax.llmapi.llm_args import LlmArgs
from trtllm_jax.logger import logger
from trtllm_jax.remote import wire
from trtllm_jax.remote.errors import decode_error
from trtllm_jax.requests.output_processor import OutputProcessor, deliver
from trtllm_jax.text.chat import Chat, read_template
from trtllm_jax.text.tokenizer_loading import load_tokenizer


class RemoteLLM(BaseLLM):
    """An `LLM` whose engine runs in another process. All methods are thread-safe.

    Prompts are tokenised and answers detokenised in this process. If the engine's process refuses a request, for
    example because its queue is full, `result()` and iteration raise the error.

    Args:
        connected: a socket whose other end an `EngineHost` serves.
        args: the arguments of the engine's `LLM`.
        loop: an event loop that receives the engine's messages; possible if only its tasks wait for results, because
            blocking it would deadlock. With None a thread receives them, which takes more processor time.

    Raises:
        EngineDeadError: there is no engine at the other end.
        ValueError: the tokenizer or the chat template cannot be read.
    """

    def __init__(self, connected: socket.socket, args: LlmArgs, loop: asyncio.AbstractEventLoop | None = None) -> None:
        tokenizer = None
        if not args.skip_tokenizer_init:
            given = args.tokenizer, args.tokenizer_mode, args.tokenizer_revision
            tokenizer = load_tokenizer(_checkpoint(args), *given)
        chat = Chat(tokenizer, read_template(args.chat_template), args.allow_request_chat_template)
        self._connection = _EngineConnection(connected, loop)
        self._connect(tokenizer, chat, self._connection.handshake.facts, self._connection)

    @property
    def failure(self) -> EngineDeadError | None:
        """The failure that ended the engine or the connection; None while there is none."""
        return self._connection.failure

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """The engine's statistics since the last call in any process; TimeoutError after `timeout` seconds."""
        stats: list[dict[str, Any]] = self._connection.query("stats", timeout)
        return stats

    def get_kv_cache_events(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """The KV cache events since the last call in any process; TimeoutError after `timeout` seconds."""
        events: list[dict[str, Any]] = self._connection.query("events", timeout)
        return events

    def get_kv_cache_capacity(self) -> dict[str, int]:
        """The KV pool's size in blocks and in tokens."""
        capacity: dict[str, int] = self._connection.query("capacity", None)
        return capacity

    def shutdown(self) -> None:
        """Close the connection, which cancels its requests; the engine keeps serving other connections."""
        self._connection.close()


def _checkpoint(args: LlmArgs) -> Any:
    return open_checkpoint(args.model, revision=args.revision, weights=False)


class _EngineConnection:
    """The connection to the engine's process: sends sequences and queries, receives steps and query results."""

    def __init__(self, connected: socket.socket, loop: asyncio.AbstractEventLoop | None) -> None:
        self._channel = wire.Channel(connected, wire.FromEngine)
        self._sending = threading.Lock()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._requests: dict[int, Request] = {}
        self._number_of: dict[int, int] = {}
        self._pending_queries: dict[int, Future[Any]] = {}
        self.failure: EngineDeadError | None = None
        handshake = self._channel.receive()
        if not isinstance(handshake, wire.Handshake):
            raise EngineDeadError("the engine's process ended before it sent anything")
        self.handshake = handshake
        self._receiver: threading.Thread | None = None
        if loop is None:
            self._receiver = threading.Thread(target=self._receive_messages, name="trtllm_jax-remote", daemon=True)
            self._receiver.start()
        else:
            loop.add_reader(self._channel.fileno(), self._on_readable, loop)

    def submit(self, requests: Sequence[Request]) -> None:
        """Send sequences. EngineDeadError if the engine has ended, ValueError if a request cannot be sent."""
        numbers = {id(request): next(self._numbers) for request in requests}
        message = wire.Submit([_encode_request(request, numbers) for request in requests])
        with self._lock:
            if self.failure is not None:
                raise self.failure
            for request in requests:
                number = numbers[id(request)]
                self._requests[number] = request
                self._number_of[id(request)] = number
        self._send(message)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a sequence soon; no effect if it has ended."""
        with self._lock:
            number = self._number_of.get(id(request))
        if number is not None:
            self._send(wire.Finish(number, reason.value))

    def query(self, name: str, timeout: float | None) -> Any:
        """The engine's answer to one of `host_connection.QUERIES`; TimeoutError after `timeout` seconds."""
        number, result = next(self._numbers), Future[Any]()
        with self._lock:
            if self.failure is not None:
                raise self.failure
            self._pending_queries[number] = result
        self._send(wire.Query(number, name))
        try:
            return result.result(timeout)
        finally:
            with self._lock:
                self._pending_queries.pop(number, None)

    def close(self) -> None:
        self._channel.close()

    def refuse_own_thread(self) -> None:
        """RuntimeError if called in the thread that receives results, which would wait for itself."""
        if self._receiver is threading.current_thread():
            raise RuntimeError("this runs in the thread that receives results, and would wait for itself")

    def _send(self, message: Any) -> None:
        # The receiver handles the end of the connection, and fails all requests.
        with self._sending, contextlib.suppress(OSError):
            self._channel.send(message)

    def _receive_messages(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self._handle([message])
                del message  # so that the waiting thread keeps no finished request alive
        finally:
            self._disconnected()

    def _on_readable(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            messages = self._channel.receive_all()
            if messages is not None:
                self._handle(messages)
                return
        except Exception:
            logger.exception("the connection to the engine ends: its messages cannot be decoded")
        loop.remove_reader(self._channel.fileno())
        self._disconnected()

    def _handle(self, messages: Sequence[Any]) -> None:
        for message in messages:
            match message:
                case wire.Steps(steps):
                    with self._lock:
                        known = [(request, step) for step in steps if (request := self._request_of(step)) is not None]
                    deliver(map(self._decode_step, known))
                case wire.QueryResult(number, value):
                    with self._lock:
                        query = self._pending_queries.pop(number, None)
                    if query is not None:
                        query.set_result(value)

    def _disconnected(self) -> None:
        self._channel.close()
        self._fail_all(self.failure or EngineDeadError("the engine's process has ended"))

    def _request_of(self, step: wire.SequenceStep) -> Request | None:
        """The request of a step; None if it is not known here any more. The caller holds the lock."""
        if step.finish is None and step.error is None:
            return self._requests.get(step.number)
        request = self._requests.pop(step.number, None)
        if request is not None:
            del self._number_of[id(request)]
        return request

    def _decode_step(self, known: tuple[Request, wire.SequenceStep]) -> Update:
        """A request's step as an `Update`, which carries the exception if the step cannot be decoded."""
        request, step = known
        try:
            return self._update(request, step)
        except Exception as failure:
            return Update(request, error=failure)

    def _update(self, request: Request, step: wire.SequenceStep) -> Update:
        error = None if step.error is None else decode_error(step.error)
        if isinstance(error, EngineDeadError):
            self.failure = error
        return Update(
            request,
            step.tokens,
            None if step.finish is None else FinishReason(step.finish),
            error,
            admission=None if step.admission is None else Admission(*step.admission),
            outputs=wire.decode_outputs(step.outputs) if step.outputs else {},
        )

    def _fail_all(self, failure: EngineDeadError) -> None:
        """End all requests and queries with this failure."""
        with self._lock:
            self.failure = failure
            requests, self._requests = list(self._requests.values()), {}
            self._number_of.clear()
            queries, self._pending_queries = list(self._pending_queries.values()), {}
        deliver(Update(request, error=failure) for request in requests)
        for query in queries:
            query.set_exception(failure)


def _encode_request(request: Request, numbers: dict[int, int]) -> wire.NewSequence:
    owner: OutputProcessor = request.owner
    if owner.params.return_generation_logits or owner.params.return_context_logits:
        raise ValueError(
            "SamplingParams.return_context_logits and return_generation_logits are not available where the engine runs "
            "in another process: use logprobs and prompt_logprobs, or an LLM in the same process"
        )
    if request.adapter is not None or request.media:
        raise ValueError("adapters and media cannot be sent to the engine's process: use an LLM in the same process")
    return wire.NewSequence(
        number=numbers[id(request)],
        prompt=np.asarray(request.prompt, np.int32).tobytes(),
        max_tokens=request.max_tokens,
        sampling=request.sampling,
        stop_ids=sorted(request.stop_ids),
        num_logprobs=request.num_logprobs,
        salt=request.salt,
        parent=-1 if request.parent is None else numbers[id(request.parent)],
        edits=wire.encode_edits(request.edits),
        prompt_logprobs=owner.params.prompt_logprobs,
        reports=sorted(request.reports),
        request_id=request.id,
        token_types=bytes(request.token_types),
    )
