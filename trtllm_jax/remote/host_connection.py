"""One connection of an `EngineHost`: receives the sequences of another process and sends back their steps."""

import queue
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np

from trtllm_jax.common.errors import detached
from trtllm_jax.engine.request import FinishReason, Request, TokenLogprobs, Update
from trtllm_jax.llmapi.base_llm import BaseLLM
from trtllm_jax.logger import logger
from trtllm_jax.remote import wire
from trtllm_jax.remote.admission import Admission
from trtllm_jax.remote.errors import encode_error
from trtllm_jax.requests.output_processor import PromptLogprobs
from trtllm_jax.structured.matcher import LLGuidanceMatcher


class RemoteSequence:
    """The owner of a request of another process: sends its steps, and nothing after its end.

    Several threads may call `take` at once: the LLM's output thread, the connection's reader if the client ends the
    request, and a compiler thread if the constraint is invalid.
    """

    def __init__(self, connection: "HostConnection", new: wire.NewSequence, prompt_logprobs: PromptLogprobs) -> None:
        self._connection = connection
        self._number = new.number
        self._wants_prompt = new.prompt_logprobs is not None
        self._is_first_sample = new.parent < 0
        self.prompt_logprobs = prompt_logprobs
        self._lock = threading.Lock()
        self._ended = False

    def take(self, update: Update) -> None:
        """Send one engine step's update of the sequence."""
        with self._lock:
            if self._ended:
                return
            # Sent before the end is recorded, so that the failure of an update that cannot be sent is still sent.
            self._send(update)
            self._ended = ended = update.finish is not None or update.error is not None
        if ended:
            self._connection.finished(self._number)

    def _send(self, update: Update) -> None:
        self._connection.enqueue(
            wire.SequenceStep(
                self._number,
                list(update.tokens),
                update.finish.value if update.finish else None,
                None if update.error is None else encode_error(update.error),
                update.admission,
                wire.encode_outputs(self._outputs(update)),
            )
        )

    def _outputs(self, update: Update) -> dict[str, Sequence[Any]]:
        """An update's outputs, with log-probabilities of the prompt in place of its logits."""
        outputs = {name: entries for name, entries in update.outputs.items() if name != "context_logits"}
        if entries := self._prompt_logprobs(update):
            outputs["prompt_logprobs"] = entries
        return outputs

    def _prompt_logprobs(self, update: Update) -> Sequence[TokenLogprobs]:
        """The prompt's entries from a first sample; from any other only the last entry, for its own first token."""
        if self._is_first_sample:
            return self.prompt_logprobs.take(update)
        if not self._wants_prompt or not update.tokens:
            return ()
        self._wants_prompt = False
        return self.prompt_logprobs.last(update.tokens[0])


class HostConnection:
    """The connection to one client process, with a reading and a writing thread.

    Args:
        llm: runs the sequences.
        admission: the limit that all connections share.
        compilers: compiles constraints.
        connected: the socket.
        ended: called when the connection has ended.
    """

    def __init__(
        self,
        llm: BaseLLM,
        admission: Admission,
        compilers: Executor,
        connected: socket.socket,
        ended: Callable[["HostConnection"], None],
    ) -> None:
        self._llm = llm
        self._admission = admission
        self._compilers = compilers
        self._ended = ended
        self._channel = wire.Channel(connected, wire.ToEngine)
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._requests: dict[int, Request] = {}
        self._compiling: set[int] = set()
        """Numbers of the sequences that are not submitted to the engine yet."""

    def start(self) -> None:
        """Queue the handshake and start the threads."""
        self.enqueue(wire.Handshake(self._llm.facts))
        for task in (self._read, self._write):
            threading.Thread(target=task, name=f"trtllm_jax-host{task.__name__}", daemon=True).start()

    def enqueue(self, message: Any) -> None:
        """Queue a message for the writing thread; never blocks."""
        self._outgoing.put(message)

    def finished(self, number: int) -> None:
        """Remove a sequence that has ended, and release its admission."""
        with self._lock:
            known = self._requests.pop(number, None)
        if known is not None:
            self._admission.release(1)

    def close(self) -> None:
        """End the connection, which ends its sequences."""
        self._channel.close()

    def _read(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self._handle(message)
        except Exception:
            logger.exception("a connection to the engine ends: its messages cannot be decoded")
        finally:
            self._channel.close()
            self._ended(self)
            with self._lock:
                left = list(self._requests)
            for number in left:
                self._finish(number, FinishReason.CANCELLED)
            self.enqueue(None)

    def _handle(self, message: Any) -> None:
        match message:
            case wire.Submit(sequences):
                self._submit(sequences)
            case wire.Finish(number, reason):
                self._finish(number, FinishReason(reason))
            case wire.Query(number, name):
                self.enqueue(wire.QueryResult(number, getattr(self._llm, QUERIES[name])()))

    def _finish(self, number: int, reason: FinishReason) -> None:
        with self._lock:
            request = self._requests.get(number)
            compiling = number in self._compiling
            self._compiling.discard(number)
        if request is None:
            return
        if compiling:
            request.finished = reason
            request.owner.take(Update(request, finish=reason))
        else:
            self._llm.port.finish(request, reason)

    def _submit(self, sequences: Sequence[wire.NewSequence]) -> None:
        made: dict[int, Request] = {}
        for new in sequences:
            made[new.number] = self._build_request(new, made.get(new.parent))
        try:
            self._admission.reserve(len(sequences))
        except Exception as failure:
            for new in sequences:
                self.enqueue(wire.SequenceStep(new.number, [], error=encode_error(failure)))
            return
        with self._lock:
            self._requests |= made
            self._compiling |= made.keys()
        if any(request.edits and request.edits.constraint for request in made.values()):
            self._compilers.submit(self._start, made)
        else:
            self._start(made)

    def _start(self, made: Mapping[int, Request]) -> None:
        """Give the sequences their matchers, and submit those that the client has not ended meanwhile."""
        try:
            matchers: dict[str | None, LLGuidanceMatcher | None] = {None: None}
            for request in made.values():
                constraint = request.edits.constraint if request.edits else None
                if constraint not in matchers:
                    matchers[constraint] = self._llm.builder.matcher(request.edits)
                matcher = matchers[constraint]
                request.matcher = matcher and matcher.copy()
            # Under the lock, so that the engine never gets a request to finish a sequence before the sequence.
            with self._lock:
                ready = [number for number in made if number in self._compiling]
                self._compiling.difference_update(ready)
                self._llm.port.submit([made[number] for number in ready])
        except BaseException as failure:  # a Rust library may panic, and nothing reads this future's exception
            with self._lock:
                self._compiling.difference_update(made)
            for request in made.values():
                request.owner.take(Update(request, error=detached(failure)))

    def _build_request(self, new: wire.NewSequence, parent: Request | None) -> Request:
        prompt = tuple(np.frombuffer(new.prompt, np.int32).tolist())
        prompt_logprobs = parent.owner.prompt_logprobs if parent else PromptLogprobs(prompt, new.prompt_logprobs)
        return Request(
            prompt=prompt,
            max_tokens=new.max_tokens,
            sampling=new.sampling,
            stop_ids=frozenset(new.stop_ids),
            num_logprobs=new.num_logprobs,
            salt=new.salt,
            parent=parent,
            owner=RemoteSequence(self, new, prompt_logprobs),
            edits=wire.decode_edits(new.edits),
            reports=frozenset(new.reports),
            id=new.request_id,
            token_types=tuple(new.token_types),
        )

    def _write(self) -> None:
        """Send queued messages until the connection ends; the steps queued at one time go out as one message."""
        while True:
            batch = [self._outgoing.get()]
            while not self._outgoing.empty():
                batch.append(self._outgoing.get())
            steps = [message for message in batch if isinstance(message, wire.SequenceStep)]
            others = [message for message in batch if not isinstance(message, wire.SequenceStep)]
            try:
                for message in others:
                    if message is not None:
                        self._channel.send(message)
                if steps:
                    self._channel.send(wire.Steps(steps))
            except OSError:
                return  # the reading thread handles the end of the connection
            if None in others:
                return


QUERIES = {"stats": "get_stats", "events": "get_kv_cache_events", "capacity": "get_kv_cache_capacity"}
"""The method of `LLM` that answers each query."""
