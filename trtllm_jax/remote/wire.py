"""The messages between an engine's process and its clients, over a connected socket.

A message is its length in four bytes, big-endian, then msgpack; it never contains code. However a peer ends, the other
notices at once, because the socket closes.
"""

import contextlib
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import msgspec
import numpy as np

from trtllm_jax.engine.logit_edits import LogitEdits
from trtllm_jax.engine.request import TokenLogprobs
from trtllm_jax.engine.sampling import Sampling
from trtllm_jax.requests.builder import EngineFacts


class NewSequence(msgspec.Struct, array_like=True):
    """The fields of an `engine.request.Request`.

    `number` is chosen by the sender; `prompt` holds int32 ids; `parent` is the number of the sample whose prompt it
    shares, -1 for none; `edits` has the fields of its `LogitEdits`; `prompt_logprobs` is the number of alternatives to
    report for each prompt token; `reports` are the names of its other outputs; `token_types` has a byte for each id, or
    none.
    """

    number: int
    prompt: bytes
    max_tokens: int
    sampling: Sampling
    stop_ids: list[int]
    num_logprobs: int | None
    salt: bytes
    parent: int
    edits: dict[str, Any] | None
    prompt_logprobs: int | None
    reports: list[str]
    request_id: int
    token_types: bytes = b""


class Submit(msgspec.Struct, array_like=True, tag="submit"):
    """Sequences to queue, all or none."""

    sequences: list[NewSequence]


class Finish(msgspec.Struct, array_like=True, tag="finish"):
    """Ends a sequence soon, with a finish reason."""

    number: int
    reason: str


class Query(msgspec.Struct, array_like=True, tag="query"):
    """A query about the engine, answered by the `QueryResult` of the same number."""

    number: int
    name: str


class Handshake(msgspec.Struct, array_like=True, tag="handshake"):
    """The engine's first message, with its limits."""

    facts: EngineFacts


class SequenceStep(msgspec.Struct, array_like=True):
    """One sequence's part of an engine step.

    `error` is a kind and a message of `errors.encode_error`; `admission` the fields of an `Admission`; `outputs` those
    of an `Update`, encoded.
    """

    number: int
    tokens: list[int]
    finish: str | None = None
    error: tuple[str, str] | None = None
    admission: tuple[int, float] | None = None
    outputs: dict[str, list[Any]] = {}


class Steps(msgspec.Struct, array_like=True, tag="steps"):
    """The steps that were queued since the last message."""

    steps: list[SequenceStep]


class QueryResult(msgspec.Struct, array_like=True, tag="query_result"):
    """The result of a `Query`."""

    number: int
    value: Any


ToEngine = Submit | Finish | Query
FromEngine = Handshake | Steps | QueryResult
Message = TypeVar("Message")


class Channel:
    """One end of a connection; one thread sends at a time, and one receives."""

    def __init__(self, connected: socket.socket, receives: Any) -> None:
        self._socket = connected
        self._decoder = msgspec.msgpack.Decoder(receives)
        self._encoder = msgspec.msgpack.Encoder()
        self._bytes = bytearray()
        self._messages: deque[Any] = deque()

    def fileno(self) -> int:
        """The socket's file descriptor."""
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        """Send a message; blocks until the operating system has accepted it. OSError if the other end has closed."""
        payload = self._encoder.encode(message)
        self._socket.sendall(len(payload).to_bytes(4, "big") + payload)

    def receive(self) -> Any:
        """The next message; None once either end has closed."""
        while not self._messages:
            if not self._read(0):
                return None
        return self._messages.popleft()

    def receive_all(self) -> list[Any] | None:
        """All messages that have arrived, without blocking; None once either end has closed."""
        alive = self._read(socket.MSG_DONTWAIT)
        messages = list(self._messages)
        self._messages.clear()
        return messages if alive or messages else None

    def _read(self, flags: int) -> bool:
        """Receive and decode bytes; False once the connection has ended or its bytes cannot be decoded."""
        try:
            data = self._socket.recv(1 << 18, flags)
            self._bytes += data
            self._decode_messages()
        except BlockingIOError:
            return True
        except (OSError, msgspec.DecodeError):
            return False
        return bool(data)

    def _decode_messages(self) -> None:
        begin = 0
        while len(self._bytes) >= begin + 4:
            end = begin + 4 + int.from_bytes(self._bytes[begin : begin + 4], "big")
            if len(self._bytes) < end:
                break
            self._messages.append(self._decoder.decode(self._bytes[begin + 4 : end]))
            begin = end
        del self._bytes[:begin]

    def close(self) -> None:
        """Close the connection; both ends notice."""
        with contextlib.suppress(OSError):  # the other end has already closed it
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def encode_edits(edits: LogitEdits | None) -> dict[str, Any] | None:
    """The fields of `edits`. ValueError if there are users' functions among them, which cannot be sent."""
    if edits is None:
        return None
    if edits.processors:
        raise ValueError(
            "SamplingParams.logits_processor is a function, which cannot be sent to the engine's process: use "
            "embedding_bias, or an LLM in the same process"
        )
    named = {field.name: getattr(edits, field.name) for field in fields(edits) if field.name != "processors"}
    return named | {"bias": None if edits.bias is None else edits.bias.tobytes()}


def decode_edits(named: dict[str, Any] | None) -> LogitEdits | None:
    """The inverse of `encode_edits`."""
    if named is None:
        return None
    bias = named["bias"]
    return LogitEdits(
        **named
        | {
            "bias": None if bias is None else np.frombuffer(bias, np.float32),
            "ends": frozenset(named["ends"]),
            "bad": tuple(map(tuple, named["bad"])),
        }
    )


def encode_outputs(outputs: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The outputs of an update: log-probabilities as plain tuples, float32 arrays as bytes."""
    return {name: list(map(_encode_output, entries)) for name, entries in outputs.items()}


def decode_outputs(outputs: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The inverse of `encode_outputs`."""
    return {name: list(map(_decode_output, entries)) for name, entries in outputs.items()}


def _encode_output(entry: TokenLogprobs | np.ndarray) -> Any:
    return entry.tobytes() if isinstance(entry, np.ndarray) else tuple(entry)


def _decode_output(entry: Any) -> TokenLogprobs | np.ndarray:
    if isinstance(entry, bytes):
        return np.frombuffer(entry, np.float32)
    token, logprob, rank, top = entry
    return TokenLogprobs(token, logprob, rank, tuple(map(tuple, top)))
