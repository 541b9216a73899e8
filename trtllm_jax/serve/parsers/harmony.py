"""gpt-oss's messages: a header of special tokens says who speaks to whom, on which channel."""

import re

from trtllm_jax.serve.parsers.base import ReasoningParser, ToolParser
from trtllm_jax.serve.parsers.scanner import Malformed, Scanner, Steps

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, RETURN, CALL = "<|end|>", "<|return|>", "<|call|>"
_WORDS = re.compile(r"[^<\n]*")
_FUNCTION = re.compile(r"\bto=functions\.([a-zA-Z0-9_.-]+)")
_MAX_HEADER_LENGTH = 200


def _header(scanner: Scanner) -> Steps[str]:
    """Takes what stands before a message's text and returns it."""
    parts: list[str] = []
    while True:
        parts.append((yield from scanner.run(_WORDS, _MAX_HEADER_LENGTH)))
        if (yield from scanner.match(MESSAGE)):
            return "".join(parts)
        for token in (CHANNEL, CONSTRAIN):
            if (yield from scanner.match(token)):
                parts.append(token)
                break
        else:
            raise Malformed


class HarmonyReasoningParser(ReasoningParser):
    """Analysis, and calls of the model's built-in tools, are reasoning; other channels are content.

    A call of a function stays in the content as a message with its header, for `HarmonyToolParser`.
    """

    keep_special_tokens = True

    def _read(self) -> Steps[None]:
        scanner = self._scanner
        marker = " to=" if (yield from scanner.match(" to=")) else ""
        while True:
            if marker in (" to=", START, CHANNEL):
                yield from self._read_message(marker)
            scanner.send_to(self._content.append)
            marker = yield from scanner.until((START, CHANNEL, END, RETURN, CALL))
            if not marker:
                return

    def _read_message(self, marker: str) -> Steps[None]:
        source = [marker]
        self._scanner.send_to(source.append)
        try:
            header = marker + (yield from _header(self._scanner))
        except Malformed:
            self._scanner.send_to(self._content.append)
            self._content[:] = [*self._content, *source]
            return
        if function := _FUNCTION.search(header):
            self._content.append(f"{CHANNEL}commentary to=functions.{function[1]}{MESSAGE}")
            self._scanner.send_to(self._content.append)
            yield from self._scanner.until((CALL, END, RETURN))
            self._content.append(CALL)
        elif "to=" in header or f"{CHANNEL}analysis" in header:
            self._scanner.send_to(self._reasoning.append)
            yield from self._scanner.until((END, CALL, RETURN))


class HarmonyToolParser(ToolParser):
    """Messages to ``functions.NAME`` are calls; expects the content that `HarmonyReasoningParser` leaves."""

    keep_special_tokens = True
    begins = (START, CHANNEL)
    ends = (END, RETURN, CALL)

    def _read_calls(self) -> Steps[None]:
        header = yield from _header(self._scanner)
        function = _FUNCTION.search(header)
        if not function:
            raise Malformed
        yield from self._scanner.spaces()
        yield from self._read_arguments(function[1])
        yield from self._scanner.spaces()
        yield from self._scanner.match(CALL)
