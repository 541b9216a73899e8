"""What parsers find in a text: events while it comes, and a whole answer once they are collected."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


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
    """A fragment of a call's arguments; all fragments together are the text of a JSON object."""

    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class CallBroken:
    """A call ends before its arguments are complete; ``source`` is its whole text, markers included.

    Text after it comes as other events. A caller that has not passed the call on shows ``source`` as content.
    """

    index: int
    source: str


ToolEvent = ContentText | CallStart | CallArguments | CallBroken


class ReasoningDelta(NamedTuple):
    """New text of the reasoning and of the content."""

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
