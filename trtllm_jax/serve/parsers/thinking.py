"""Reasoning between <think> and </think>."""

from trtllm_jax.serve.parsers.base import ReasoningParser
from trtllm_jax.serve.parsers.scanner import Steps

OPEN, CLOSE = "<think>", "</think>"


class ThinkParser(ReasoningParser):
    """Text that begins with ``<think>`` is reasoning up to ``</think>``; newlines around the tags are the format's.

    ``opened`` says that the prompt has opened the tag already. Without ``</think>`` all of it is reasoning.
    """

    def __init__(self, *, opened: bool) -> None:
        self._opened = opened
        self._newlines: list[str] = []
        self._shown = False
        super().__init__()

    def _read(self) -> Steps[None]:
        scanner = self._scanner
        before: list[str] = []
        scanner.send_to(before.append)
        yield from scanner.spaces()
        if (yield from scanner.match(OPEN)) or self._opened:
            yield from self._read_reasoning()
        else:
            scanner.send_to(self._content.append)
            self._content[:0] = before
        yield from scanner.rest()

    def _read_reasoning(self) -> Steps[None]:
        scanner = self._scanner
        scanner.send_to(self._emit_reasoning)
        yield from scanner.until((CLOSE,))
        scanner.send_to(lambda newlines: None)
        while (yield from scanner.match("\n")):
            pass
        scanner.send_to(self._content.append)

    def _emit_reasoning(self, text: str) -> None:
        if not self._shown:
            text = text.lstrip("\n")
        shown = text.rstrip("\n")
        if shown:
            self._reasoning += [*self._newlines, shown]
            self._newlines.clear()
            self._shown = True
        if self._shown:
            self._newlines.append(text[len(shown) :])
