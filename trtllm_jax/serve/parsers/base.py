"""The base classes of parsers, which take text in pieces and give events as soon as these are certain."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from trtllm_jax.serve.parsers.events import (
    CallArguments,
    CallBroken,
    CallStart,
    ContentText,
    ReasoningDelta,
    ToolEvent,
)
from trtllm_jax.serve.parsers.scanner import Malformed, Scanner, Steps, json_object

NAME_CHARACTERS = re.compile(r"[a-zA-Z0-9_.-]*")


class _IncrementalParser(ABC):
    """Runs a coroutine over text that comes in pieces; the result does not depend on how the text is cut."""

    def __init__(self) -> None:
        self._scanner = Scanner()
        self._steps = self._read()

    @abstractmethod
    def _read(self) -> Steps[None]:
        """Reads the whole text."""

    def _advance(self, text: str) -> None:
        if text:
            self._scanner.add(text)
            next(self._steps, None)

    def _end(self) -> None:
        self._scanner.end()
        next(self._steps, None)


class ReasoningParser(_IncrementalParser):
    """Splits one answer into reasoning and content; no text is an error."""

    keep_special_tokens: ClassVar[bool] = False
    """Whether the text must hold the model's special tokens (``skip_special_tokens=False``)."""

    def __init__(self) -> None:
        super().__init__()
        self._reasoning: list[str] = []
        self._content: list[str] = []
        next(self._steps, None)

    def feed(self, text: str) -> ReasoningDelta:
        """What ``text`` makes certain."""
        self._advance(text)
        return self._drain()

    def finish(self) -> ReasoningDelta:
        """The rest, once no more text comes."""
        self._end()
        return self._drain()

    def _drain(self) -> ReasoningDelta:
        delta = ReasoningDelta("".join(self._reasoning), "".join(self._content))
        self._reasoning.clear()
        self._content.clear()
        return delta


class ToolParser(_IncrementalParser):
    """Finds the tool calls in one answer's content; no text is an error.

    ``tools`` are the tools the model was given, in OpenAI's form: with them a call of any other name is content.
    Text that is no complete call is content, unchanged. White space between content and calls is the format's own, and
    left out. What goes wrong after a call's arguments have begun gives `CallBroken`.
    """

    keep_special_tokens: ClassVar[bool] = False
    """Whether the text must hold the model's special tokens (``skip_special_tokens=False``)."""
    begins: ClassVar[tuple[str, ...]]
    """The markers that open calls."""
    ends: ClassVar[tuple[str, ...]] = ()
    """Special tokens that end a message, and are never content."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._events: list[ToolEvent] = []
        self._held_spaces: list[str] = []
        self._source: list[str] = []
        self._calls = 0
        self._open = False
        self._any_complete = False
        next(self._steps, None)

    def feed(self, text: str) -> list[ToolEvent]:
        """What ``text`` makes certain."""
        self._advance(text)
        return self._drain()

    def finish(self) -> list[ToolEvent]:
        """The rest, once no more text comes."""
        self._end()
        return self._drain()

    @abstractmethod
    def _read_calls(self) -> Steps[None]:
        """Reads what follows one of ``begins``; Malformed where it is no call."""

    def _read(self) -> Steps[None]:
        while True:
            self._scanner.send_to(self._emit_content)
            marker = yield from self._scanner.until(self.begins + self.ends)
            if not marker:
                break
            if marker in self.begins:
                yield from self._try_calls(marker)
        if not self._any_complete:
            self._events.append(ContentText("".join(self._held_spaces)))

    def _try_calls(self, marker: str) -> Steps[None]:
        self._source = [*self._held_spaces, marker]
        self._held_spaces.clear()
        self._scanner.send_to(self._buffer)
        try:
            yield from self._read_calls()
        except Malformed:
            self._scanner.send_to(self._emit_content)
            self._abandon_call()

    def _abandon_call(self) -> None:
        source = "".join(self._source)
        if self._open:
            self._events.append(CallBroken(self._calls - 1, source))
            self._open = False
        else:
            self._emit_content(source)

    def _emit_content(self, text: str) -> None:
        shown = text.rstrip()
        if shown:
            self._events.append(ContentText("".join(self._held_spaces) + shown))
            self._held_spaces.clear()
        self._held_spaces.append(text[len(shown) :])

    def _buffer(self, text: str) -> None:
        self._source.append(text)

    def _begin_call(self, name: str) -> None:
        if not 0 < len(name) <= 64 or not NAME_CHARACTERS.fullmatch(name) or (
            self._schemas and name not in self._schemas
        ):  # fmt: skip
            raise Malformed
        self._events.append(CallStart(self._calls, name))
        self._calls += 1
        self._open = True

    def _emit_arguments(self, fragment: str) -> None:
        self._events.append(CallArguments(self._calls - 1, fragment))

    def _end_call(self) -> None:
        self._scanner.send_to(self._buffer)
        self._source.clear()
        self._open, self._any_complete = False, True

    def _read_arguments(self, name: str) -> Steps[None]:
        """A call whose arguments are a JSON object that comes next."""
        if (yield from self._scanner.peek()) != "{":
            raise Malformed
        self._begin_call(name)

        def buffer_and_emit(text: str) -> None:
            self._buffer(text)
            self._emit_arguments(text)

        self._scanner.send_to(buffer_and_emit)
        yield from json_object(self._scanner)
        self._end_call()

    def _capture(self, steps: Steps[Any]) -> Steps[str]:
        """The text that ``steps`` takes."""
        parts: list[str] = []

        def buffer_and_capture(text: str) -> None:
            self._buffer(text)
            parts.append(text)

        self._scanner.send_to(buffer_and_capture)
        yield from steps
        self._scanner.send_to(self._buffer)
        return "".join(parts)

    def _drain(self) -> list[ToolEvent]:
        events = [event for event in self._events if not isinstance(event, ContentText) or event.text]
        self._events.clear()
        return events
