"""Parses the streamed answers of an OpenAI-compatible server as their bytes arrive, and records their times."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_DETAIL = 300
"""The most characters of a server's message that a failure keeps."""

MAX_LINE = 1 << 24
"""The most bytes of a line of an event stream."""

_TEXT_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls", "http_failure")


class RequestFailure(Exception):
    """A failed request: `kind` is the category by which failures are counted, `detail` describes this one."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True)
class Answer:
    """One request's outcome; times are seconds of the monotonic clock, which processes share.

    Attributes:
        submitted: when the request was sent, before opening a connection if it needed a new one.
        ended: when the answer was complete, or the request failed.
        arrivals: the times of reads that contained new text.
        input_tokens: the server's count of the prompt's tokens; None if it gave none.
        output_tokens: the server's count of the answer's tokens, else the number of choices with text.
        counted: whether `output_tokens` is the server's count.
        failure: the kind of failure, empty for a complete answer.
        detail: a description of the failure.
    """

    submitted: float
    ended: float
    arrivals: tuple[float, ...] = ()
    input_tokens: int | None = None
    output_tokens: int = 0
    counted: bool = False
    failure: str = ""
    detail: str = ""


class AnswerParser:
    """Parses one streamed answer of /completions or /chat/completions."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.beginning = b""
        self._events = EventParser()
        self._text_events = 0
        self._finished: float | None = None
        self._done = False
        self._usage: Any = None

    def feed(self, data: bytes, now: float) -> None:
        """Parse `data`, which arrived at time `now`. RequestFailure if it is an error or not an event of this API."""
        if len(self.beginning) < MAX_DETAIL:
            self.beginning += data
        for event in self._events.feed(data):
            if event == b"[DONE]":
                self._done = True
            else:
                self._handle_event(event, now)

    def _handle_event(self, event: bytes, now: float) -> None:
        try:
            chunk = json.loads(event)
            if error := chunk.get("error"):
                raise RequestFailure("error in the stream", _server_message(error))
            text_choices = 0
            for choice in chunk.get("choices") or ():
                text_choices += _has_text(choice)
                if choice.get("finish_reason") is not None:
                    self._finished = now
            self._usage = chunk.get("usage") or self._usage
        except (ValueError, TypeError, AttributeError) as error:
            raise RequestFailure("malformed event", _quote(event)) from error
        if text_choices:
            self._text_events += text_choices
            if not self.arrivals or self.arrivals[-1] != now:
                self.arrivals.append(now)

    def answer(self, submitted: float, ended: float) -> Answer:
        """The answer; RequestFailure if the stream ended before it was complete."""
        if self._finished is None and not self._done:
            raise RequestFailure("incomplete answer", f"no finish_reason or [DONE]; it begins {_quote(self.beginning)}")
        prompt, output = self._token_count("prompt_tokens"), self._token_count("completion_tokens")
        # An answer without text, such as an immediate end or special tokens only, arrived when it was finished.
        arrivals = tuple(self.arrivals) or (ended if self._finished is None else self._finished,)
        tokens = self._text_events if output is None else output
        return Answer(submitted, ended, arrivals, prompt, tokens, output is not None)

    def _token_count(self, name: str) -> int | None:
        value = self._usage.get(name) if isinstance(self._usage, dict) else None
        return value if isinstance(value, int) and value >= 0 else None


class EventParser:
    """Splits a stream of server-sent events into the data of each event (WHATWG HTML, 9.2)."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The events that `data` completes; RequestFailure if a line is too long."""
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


def _has_text(choice: dict[str, Any]) -> bool:
    """Whether a choice has new text; a chat's first event has only a role."""
    delta = choice.get("delta")
    return bool(choice.get("text")) if delta is None else any(delta.get(name) for name in _TEXT_FIELDS)


def _server_message(value: Any) -> str:
    """A server's error message on one line."""
    text = value.get("message", value) if isinstance(value, dict) else value
    return " ".join(str(text).split())[:MAX_DETAIL]


def _quote(data: bytes) -> str:
    return repr(data[:MAX_DETAIL].decode(errors="replace"))


def http_failure(status: int, body: bytes) -> RequestFailure:
    """The failure of a request whose status is not 200."""
    try:
        record = json.loads(body)
        words = _server_message(record.get("error") or record)
    except (ValueError, AttributeError):
        words = _quote(body)
    return RequestFailure(f"HTTP {status}", words)
