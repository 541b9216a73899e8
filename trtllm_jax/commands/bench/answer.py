"""What an OpenAI-compatible server answered and when: its server-sent events, read as their bytes arrive."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DETAIL = 300
"""Characters of a server's own words that a failure keeps."""

MAX_LINE = 1 << 24
"""Bytes of one line; a server that sends more sends no events."""

_TEXTS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")


class RequestFailure(Exception):
    """One request failed: `kind` is what failures are counted by, `detail` what happened to this one."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True)
class Answer:
    """One request's outcome; times are seconds of the monotonic clock, which processes share.

    Attributes:
        submitted: when it was sent, before a connection was opened where it needed one.
        ended: when its answer was complete, or it failed.
        arrivals: when reads brought new text, one time a read.
        input_tokens: of the prompt as the server counts; None where it does not say.
        output_tokens: as the server counts, else the events that brought text.
        counted: whether the server counted them.
        failure: the kind of failure, empty for a complete answer.
        detail: what happened then.
    """

    submitted: float
    ended: float
    arrivals: tuple[float, ...] = ()
    input_tokens: int | None = None
    output_tokens: int = 0
    counted: bool = False
    failure: str = ""
    detail: str = ""


class AnswerReader:
    """Collects one streamed answer of /completions or /chat/completions. `feed` takes bytes and when they arrived."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.beginning = b""
        self._events = EventReader()
        self._texts = 0
        self._finished: float | None = None
        self._done = False
        self._usage: Any = None

    def feed(self, data: bytes, now: float) -> None:
        """RequestFailure where the server reports an error, or says what is no event of this API."""
        if len(self.beginning) < DETAIL:
            self.beginning += data
        for event in self._events.feed(data):
            if event == b"[DONE]":
                self._done = True
            else:
                self._take(event, now)

    def _take(self, event: bytes, now: float) -> None:
        try:
            chunk = json.loads(event)
            if error := chunk.get("error"):
                raise RequestFailure("error in the stream", _words(error))
            texts = 0
            for choice in chunk.get("choices") or ():
                texts += _brings_text(choice)
                if choice.get("finish_reason") is not None:
                    self._finished = now
            self._usage = chunk.get("usage") or self._usage
        except (ValueError, TypeError, AttributeError) as error:
            raise RequestFailure("malformed event", _quoted(event)) from error
        if texts:
            self._texts += texts
            if not self.arrivals or self.arrivals[-1] != now:
                self.arrivals.append(now)

    def answer(self, submitted: float, ended: float) -> Answer:
        """What came; RequestFailure where the stream ended before the answer did."""
        if self._finished is None and not self._done:
            raise RequestFailure(
                "incomplete answer", f"no finish_reason or [DONE]; it begins {_quoted(self.beginning)}"
            )
        prompt, output = self._count("prompt_tokens"), self._count("completion_tokens")
        # An answer whose tokens have no text (an end at once, special tokens) arrived when it was finished.
        arrivals = tuple(self.arrivals) or (ended if self._finished is None else self._finished,)
        tokens = self._texts if output is None else output
        return Answer(submitted, ended, arrivals, prompt, tokens, output is not None)

    def _count(self, name: str) -> int | None:
        value = self._usage.get(name) if isinstance(self._usage, dict) else None
        return value if isinstance(value, int) and value >= 0 else None


class EventReader:
    """Cuts a stream of server-sent events into the data of each (WHATWG HTML, 9.2)."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The events that `data` completes; RequestFailure where a line does not end."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            raise RequestFailure("malformed event", f"a line of more than {MAX_LINE} bytes")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                event, self._data = b"\n".join(self._data), []
                yield event


def _brings_text(choice: dict[str, Any]) -> bool:
    """Whether a choice of one event holds any new text; a chat's first event names its role only."""
    delta = choice.get("delta")
    return bool(choice.get("text")) if delta is None else any(delta.get(name) for name in _TEXTS)


def _words(value: Any) -> str:
    """A server's words on one line."""
    text = value.get("message", value) if isinstance(value, dict) else value
    return " ".join(str(text).split())[:DETAIL]


def _quoted(data: bytes) -> str:
    return repr(data[:DETAIL].decode(errors="replace"))


def refusal(status: int, body: bytes) -> RequestFailure:
    """The failure of an answer whose status is not 200."""
    try:
        record = json.loads(body)
        words = _words(record.get("error") or record)
    except (ValueError, AttributeError):
        words = _quoted(body)
    return RequestFailure(f"HTTP {status}", words)
