"""What every parser offers: text in, as it comes, and out what it means, as soon as that is certain."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from trtllm_jax.serve.parsers.scanner import Malformed, Scanner, Steps, json_object

NAME_CHARACTERS = re.compile(r"[a-zA-Z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class ContentText:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; ``index`` counts the calls of one answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A fragment of a call's arguments; all of them in a row are the text of a JSON object."""

    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class CallBroken:
    """A call that was begun ends before its arguments are complete; ``source`` is its whole text, markers included.

    What follows it comes as other events. Who has not passed the call on shows ``source`` as content.
    """

    index: int
    source: str


ToolEvent = ContentText | CallStart | CallArguments | CallBroken


class ReasoningDelta(NamedTuple):
    """What is new of the reasoning and of the content."""

    reasoning: str
    content: str


class Call(NamedTuple):
    """A complete call; ``arguments`` is the text of a JSON object as the model wrote it."""

    name: str
    arguments: str


class Parsed(NamedTuple):
    """A whole answer."""

    content: str
    calls: tuple[Call, ...]


class _Machine(ABC):
    """Runs a coroutine over text that comes in pieces; what it finds cannot depend on how the text was cut."""

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


class ReasoningParser(_Machine):
    """Divides one answer into reasoning and content; no text raises an error."""

    keep_special_tokens: ClassVar[bool] = False
    """Whether the text must hold the model's special tokens (``skip_special_tokens=False``)."""

    def __init__(self) -> None:
        super().__init__()
        self._reasoning: list[str] = []
        self._content: list[str] = []
        next(self._steps, None)

    def feed(self, text: str) -> ReasoningDelta:
        """What ``text`` made certain."""
        self._advance(text)
        return self._take()

    def finish(self) -> ReasoningDelta:
        """The rest, once no more text comes."""
        self._end()
        return self._take()

    def _take(self) -> ReasoningDelta:
        delta = ReasoningDelta("".join(self._reasoning), "".join(self._content))
        self._reasoning.clear()
        self._content.clear()
        return delta


class ToolParser(_Machine):
    """Finds the tool calls of one answer's content; no text raises an error.

    ``tools`` are the tools the model was given, in OpenAI's form: with them a call of any other name is content.
    Text that is no complete call is content, unchanged. White space between content and calls is the format's own, and
    left out. What goes wrong after a call's arguments have begun gives `CallBroken`.
    """

    keep_special_tokens: ClassVar[bool] = False
    """Whether the text must hold the model's special tokens (``skip_special_tokens=False``)."""
    begins: ClassVar[tuple[str, ...]]
    """What opens calls."""
    ends: ClassVar[tuple[str, ...]] = ()
    """Special tokens that end a message; they never show."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._events: list[ToolEvent] = []
        self._spaces: list[str] = []
        self._source: list[str] = []
        self._calls = 0
        self._open = False
        self._any_complete = False
        next(self._steps, None)

    def feed(self, text: str) -> list[ToolEvent]:
        """What ``text`` made certain."""
        self._advance(text)
        return self._take()

    def finish(self) -> list[ToolEvent]:
        """The rest, once no more text comes."""
        self._end()
        return self._take()

    @abstractmethod
    def _read_calls(self) -> Steps[None]:
        """Reads what follows one of ``begins``; Malformed where it is no call."""

    def _read(self) -> Steps[None]:
        while True:
            self._scanner.send_to(self._show)
            marker = yield from self._scanner.until(self.begins + self.ends)
            if not marker:
                break
            if marker in self.begins:
                yield from self._attempt(marker)
        if not self._any_complete:
            self._events.append(ContentText("".join(self._spaces)))

    def _attempt(self, marker: str) -> Steps[None]:
        self._source = [*self._spaces, marker]
        self._spaces.clear()
        self._scanner.send_to(self._keep)
        try:
            yield from self._read_calls()
        except Malformed:
            self._scanner.send_to(self._show)
            self._give_up()

    def _give_up(self) -> None:
        source = "".join(self._source)
        if self._open:
            self._events.append(CallBroken(self._calls - 1, source))
            self._open = False
        else:
            self._show(source)

    def _show(self, text: str) -> None:
        shown = text.rstrip()
        if shown:
            self._events.append(ContentText("".join(self._spaces) + shown))
            self._spaces.clear()
        self._spaces.append(text[len(shown) :])

    def _keep(self, text: str) -> None:
        self._source.append(text)

    def _begin_call(self, name: str) -> None:
        if not 0 < len(name) <= 64 or not NAME_CHARACTERS.fullmatch(name) or (
            self._schemas and name not in self._schemas
        ):  # fmt: skip
            raise Malformed
        self._events.append(CallStart(self._calls, name))
        self._calls += 1
        self._open = True

    def _argue(self, fragment: str) -> None:
        self._events.append(CallArguments(self._calls - 1, fragment))

    def _end_call(self) -> None:
        self._scanner.send_to(self._keep)
        self._source.clear()
        self._open, self._any_complete = False, True

    def _read_arguments(self, name: str) -> Steps[None]:
        """A call whose arguments are a JSON object that comes next."""
        if (yield from self._scanner.peek()) != "{":
            raise Malformed
        self._begin_call(name)

        def keep_and_argue(text: str) -> None:
            self._keep(text)
            self._argue(text)

        self._scanner.send_to(keep_and_argue)
        yield from json_object(self._scanner)
        self._end_call()

    def _captured(self, steps: Steps[Any]) -> Steps[str]:
        """The text that ``steps`` takes."""
        parts: list[str] = []

        def keep_twice(text: str) -> None:
            self._keep(text)
            parts.append(text)

        self._scanner.send_to(keep_twice)
        yield from steps
        self._scanner.send_to(self._keep)
        return "".join(parts)

    def _take(self) -> list[ToolEvent]:
        events = [event for event in self._events if not isinstance(event, ContentText) or event.text]
        self._events.clear()
        return events


def collect(events: Iterable[ToolEvent]) -> Parsed:
    """The whole answer that a parser's events make up; calls that broke are content."""
    pieces: list[str] = []
    calls: dict[int, tuple[str, list[str]]] = {}
    for event in events:
        match event:
            case ContentText(text):
                pieces.append(text)
            case CallStart(index, name):
                calls[index] = (name, [])
            case CallArguments(index, fragment):
                calls[index][1].append(fragment)
            case CallBroken(index, source):
                del calls[index]
                pieces.append(source)
    return Parsed("".join(pieces), tuple(Call(name, "".join(fragments)) for name, fragments in calls.values()))
