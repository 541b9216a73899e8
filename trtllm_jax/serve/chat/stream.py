"""The events of a chat's stream."""

from collections.abc import AsyncIterator
from typing import Any

from trtllm_jax.requests.outputs import CompletionOutput
from trtllm_jax.serve.chat.logprobs import ChatLogprobs
from trtllm_jax.serve.chat.parser import ChatParser, Delta
from trtllm_jax.serve.http.json_response import as_json
from trtllm_jax.serve.http.sse import ChunkEncoder
from trtllm_jax.serve.http.tracker import RequestTracker
from trtllm_jax.serve.protocol.chat import ChatRequest
from trtllm_jax.serve.usage import usage

_CONTENT_CHOICE = b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}'
_ROLE: Delta = {"role": "assistant", "content": ""}


class ChatStream:
    """Encodes the steps of a chat's answers as chunks."""

    def __init__(self, tracker: RequestTracker, body: ChatRequest, parser: ChatParser, head: dict[str, Any]) -> None:
        self._tracker = tracker
        (self._output,) = tracker.outputs
        options = body.stream_options
        self._final_usage = options is not None and options.include_usage
        self._continuous_usage = options is not None and options.continuous_usage_stats
        self._encoder = ChunkEncoder(head, usage=self._final_usage)
        self._wants_logprobs = bool(body.logprobs)
        self._parsers = [parser.message_parser(self._output.prompt) for _ in self._output.outputs]
        self._logprobs = [ChatLogprobs(tracker, body) for _ in self._output.outputs]
        self._started: set[int] = set()
        self._finished: set[int] = set()

    async def events(self) -> AsyncIterator[bytes]:
        """The events of each step, joined."""
        async for step in self._output:
            running = [one for one in step.outputs if one.index not in self._finished]
            if choices := [choice for one in running for choice in self._choices(one)]:
                yield b"".join(map(self._encode, choices))
        if self._final_usage and not self._tracker.disconnected:
            yield self._encoder.encode_with_usage(b"", usage([self._output]))

    def _encode(self, choice: bytes) -> bytes:
        if self._continuous_usage:
            return self._encoder.encode_with_usage(choice, usage([self._output]))
        return self._encoder.encode(choice)

    def _choices(self, one: CompletionOutput) -> list[bytes]:
        """The choices of what the last step added to one answer."""
        finish = one.finish_reason
        parser = self._parsers[one.index]
        first = one.index not in self._started
        if parser.is_content_only and not first and not finish and not self._wants_logprobs:
            text = one.text_diff
            return [_CONTENT_CHOICE % (one.index, as_json(text))] if text else []
        self._started.add(one.index)
        deltas = [_ROLE] if first else []
        deltas += parser.feed(one.text_diff) if one.text_diff else []
        if finish:
            deltas += parser.finish()
        choices = self._delta_choices(one, deltas, has_role=first)
        if finish and finish != "cancelled":
            self._finished.add(one.index)
            choices.append(_encode_choice(one.index, {}, None, parser.finish_reason(finish), one.stop_reason))
        return choices

    def _delta_choices(self, one: CompletionOutput, deltas: list[Delta], *, has_role: bool) -> list[bytes]:
        """A step's tokens go with the last of its deltas: text may be held back, tokens are not."""
        tokens = one.token_ids_diff
        logprobs = self._logprobs[one.index].of(tokens, one.logprobs_diff) if tokens else None
        if logprobs and len(deltas) == has_role:
            deltas.append({})
        choices = [_encode_choice(one.index, delta) for delta in deltas]
        if logprobs:
            choices[-1] = _encode_choice(one.index, deltas[-1], logprobs)
        return choices


def _encode_choice(
    index: int,
    delta: Delta,
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
    stop_reason: int | str | None = None,
) -> bytes:
    public = {name: value for name, value in delta.items() if name != "broken"}
    choice = {"index": index, "delta": public, "logprobs": logprobs, "finish_reason": finish_reason}
    return as_json(choice if finish_reason is None else {**choice, "stop_reason": stop_reason})
