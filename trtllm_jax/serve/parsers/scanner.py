"""`Scanner`: text that arrives in pieces, read by coroutines that wait at its end for more."""

import json
import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A coroutine that yields whenever it needs more text."""

_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR = re.compile(r"[-+.0-9A-Za-z]*")
_HEX = re.compile(r"[0-9A-Fa-f]")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_MAX_SCALAR_LENGTH, _MAX_DEPTH = 1000, 128
"""Python's json refuses longer integers and deeper values somewhere beyond these limits."""


class Malformed(Exception):
    """The text at hand is not what was expected; everything before it has been taken."""


class Scanner:
    """The text not yet taken; taken text goes to a sink as soon as no more of it is at hand."""

    def __init__(self) -> None:
        self._text = ""
        self._at = self._reported = 0
        self._ended = False
        self._sink: Callable[[str], None] = lambda text: None

    def add(self, text: str) -> None:
        """More text; the coroutine must be waiting."""
        self._text = self._text[self._at :] + text
        self._at = self._reported = 0

    def end(self) -> None:
        """No more text will come."""
        self._ended = True

    def send_to(self, sink: Callable[[str], None]) -> None:
        """What is taken from here on goes to ``sink``."""
        self._report()
        self._sink = sink

    def peek(self) -> Steps[str]:
        """The next character, "" at the text's end."""
        while self._at == len(self._text) and not self._ended:
            yield from self._wait()
        return self._text[self._at : self._at + 1]

    def take(self) -> None:
        """Takes the character that `peek` showed."""
        self._at += 1

    def match(self, literal: str) -> Steps[bool]:
        """Takes ``literal`` if it comes next, otherwise nothing."""
        while True:
            if self._text.startswith(literal, self._at):
                self._at += len(literal)
                return True
            rest = self._text[self._at : self._at + len(literal)]
            if self._ended or not literal.startswith(rest):
                return False
            yield from self._wait()

    def require(self, literal: str) -> Steps[None]:
        """Takes ``literal``; Malformed if something else comes next."""
        if not (yield from self.match(literal)):
            raise Malformed

    def run(self, pattern: re.Pattern[str], max_length: int | None = None) -> Steps[str]:
        """Takes what ``pattern``, a repeated character class, matches; Malformed beyond ``max_length`` characters."""
        parts: list[str] = []
        length = 0
        while True:
            found = pattern.match(self._text, self._at)
            end = found.end() if found else self._at
            if max_length is not None and length + end - self._at > max_length:
                self._at += max_length - length
                raise Malformed
            parts.append(self._text[self._at : end])
            length += end - self._at
            self._at = end
            if end < len(self._text) or self._ended:
                return "".join(parts)
            yield from self._wait()

    def spaces(self) -> Steps[None]:
        """Takes JSON's white space."""
        yield from self.run(_SPACE)

    def until(self, markers: tuple[str, ...]) -> Steps[str]:
        """Takes all before the first marker, which leaves the text unreported and is returned; "" at the text's end.

        No marker may be a part of another.
        """
        pattern = re.compile("|".join(map(re.escape, markers)))
        while True:
            if found := pattern.search(self._text, self._at):
                self._at = found.start()
                self._report()
                self._at = self._reported = found.end()
                return found[0]
            if self._ended:
                self._at = len(self._text)
                self._report()
                return ""
            self._at = len(self._text) - _partial_marker_length(self._text[self._at :], markers)
            yield from self._wait()

    def rest(self) -> Steps[None]:
        """Takes all up to the text's end."""
        while (yield from self.peek()):
            self._at = len(self._text)

    def _wait(self) -> Steps[None]:
        self._report()
        yield

    def _report(self) -> None:
        if self._at > self._reported:
            self._sink(self._text[self._reported : self._at])
            self._reported = self._at


def _partial_marker_length(text: str, markers: tuple[str, ...]) -> int:
    """The length of the longest end of ``text`` with which a marker begins."""
    longest = min(len(text), max(map(len, markers)) - 1)
    return next((n for n in range(longest, 0, -1) if any(m.startswith(text[-n:]) for m in markers)), 0)


def json_string(scanner: Scanner) -> Steps[str]:
    """Takes a JSON string and returns what it means."""
    yield from scanner.require('"')
    parts = ['"']
    while True:
        parts.append((yield from scanner.run(_PLAIN)))
        if (yield from scanner.match('"')):
            parts.append('"')
            return str(json.loads("".join(parts)))
        yield from scanner.require("\\")
        escape = yield from scanner.peek()
        if not escape or escape not in '"\\/bfnrtu':
            raise Malformed
        scanner.take()
        parts.append("\\" + escape)
        for _ in range(4 if escape == "u" else 0):
            digit = yield from scanner.peek()
            if not _HEX.match(digit):
                raise Malformed
            scanner.take()
            parts.append(digit)


def json_object(scanner: Scanner) -> Steps[None]:
    """Takes a JSON object."""
    if (yield from scanner.peek()) != "{":
        raise Malformed
    yield from json_value(scanner)


def json_value(scanner: Scanner) -> Steps[None]:
    """Takes a JSON value as RFC 8259 has it: no trailing commas, no NaN."""
    closers: list[str] = []
    while True:
        yield from scanner.spaces()
        opened = yield from scanner.peek()
        if opened in ("{", "["):
            scanner.take()
            closer = "}" if opened == "{" else "]"
            yield from scanner.spaces()
            if not (yield from scanner.match(closer)):
                closers.append(closer)
                if len(closers) > _MAX_DEPTH:
                    raise Malformed
                if closer == "}":
                    yield from _object_key(scanner)
                continue
        elif opened == '"':
            yield from json_string(scanner)
        else:
            yield from _scalar(scanner)
        while closers:
            yield from scanner.spaces()
            if (yield from scanner.match(",")):
                if closers[-1] == "}":
                    yield from _object_key(scanner)
                break
            yield from scanner.require(closers.pop())
        else:
            return


def _object_key(scanner: Scanner) -> Steps[None]:
    yield from scanner.spaces()
    yield from json_string(scanner)
    yield from scanner.spaces()
    yield from scanner.require(":")


def _scalar(scanner: Scanner) -> Steps[None]:
    text = yield from scanner.run(_SCALAR, _MAX_SCALAR_LENGTH)
    if text not in ("true", "false", "null") and not _NUMBER.fullmatch(text):
        raise Malformed
