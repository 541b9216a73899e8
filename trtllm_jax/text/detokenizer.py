"""Text that grows token by token: never half a character, never the beginning of a stop string."""

from collections.abc import Sequence
from typing import NamedTuple

from trtllm_jax.text.tokenizer import REPLACEMENT, Tokenizer

# A UTF-8 character has at most four bytes and a token at least one.
_LONGEST_CHARACTER = 4


class _Hit(NamedTuple):
    end: int
    start: int
    stop: str


class IncrementalDetokenizer:
    """The text of one generated sequence, released as soon as no later token can change it.

    Without a stop, everything released after ``finish`` equals ``tokenizer.decode`` of all appended ids. As in
    TensorRT-LLM the prompt has no part in it: a sentencepiece model's text starts without the leading space. Where
    ``after`` is an id, the text is what follows it instead.
    The stop string that ends first wins, the longest of several that end together; cutting does not depend on how ids
    are grouped into ``append`` calls. With ``skip_special_tokens`` a stop string that is a special token still stops.
    The cost a token is constant: one token of context is enough to decode the next ones as the decoder would in place.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        after: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stops = stop
        self._stop_bytes = tuple(stop.encode() for stop in stop)
        self._include_stop = include_stop
        self._released: list[str] = []
        self._held = ""
        self._anchor = after
        self._pending: list[int] = []
        self._pending_counts: list[int] = []
        # What a stop string may end in while ids are pending: the held text's bytes, then theirs; None: no longer text.
        self._run: bytearray | None = bytearray()
        self._count = 0
        self._stopped: str | None = None
        self._num_tokens_at_stop: int | None = None

    @property
    def text(self) -> str:
        """All text released so far."""
        self._released = ["".join(self._released)]
        return self._released[0]

    @property
    def stopped(self) -> str | None:
        """The stop string that was hit; from then on ids are ignored."""
        return self._stopped

    @property
    def num_tokens_at_stop(self) -> int | None:
        """How many of the appended ids it took to complete the stop string."""
        return self._num_tokens_at_stop

    def append(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` made safe to show, possibly empty."""
        return self._release("".join([self._advance(token_id) for token_id in ids]))

    def finish(self) -> str:
        """The rest, once no more ids come: what looked like a stop string, and U+FFFD for an incomplete character."""
        if self._stopped is not None:
            return ""
        rest = self._settle()
        if self._stopped is None:
            rest, self._held = rest + self._held, ""
        return self._release(rest)

    def _release(self, text: str) -> str:
        if text:
            self._released.append(text)
        return text

    def _advance(self, token_id: int) -> str:
        if self._stopped is not None:
            return ""
        self._count += 1
        piece = self._tokenizer.piece(token_id)
        if not piece.known:
            return ""
        if piece.special and self._skip_special_tokens:
            return self._stop_at_special(piece.text) if piece.text in self._stops else ""
        self._pending.append(token_id)
        self._pending_counts.append(self._count)
        if piece.byte is not None:
            return self._settle() if self._byte_completes_stop(piece.byte) else ""
        if piece.text.endswith(REPLACEMENT) and self._ends_inside_character():
            return ""
        return self._settle()

    def _byte_completes_stop(self, byte: int) -> bool:
        """Whether a stop string is complete with this byte, although more bytes could still spoil the run's text."""
        if not self._stops or self._run is None:
            return False
        self._run.append(byte)
        if not self._run.endswith(self._stop_bytes):
            return False
        window = self._held + self._tokenizer.text_behind(self._anchor, self._pending)
        if any(stop in window for stop in self._stops):
            return True
        self._run = None
        return False

    def _ends_inside_character(self) -> bool:
        return self._tokenizer.decode(self._pending[-_LONGEST_CHARACTER:], False).endswith(REPLACEMENT)

    def _settle(self) -> str:
        """Decodes the pending ids behind the anchor, whose presence keeps them from being treated as a text's start."""
        if not self._pending:
            return ""
        ids, counts, anchor = self._pending, self._pending_counts, self._anchor
        self._pending, self._pending_counts = [], []
        text = self._tokenizer.text_behind(anchor, ids)
        self._anchor = ids[-1]
        if not self._stops:
            return text
        held = self._held
        safe, end = self._cut(held + text)
        if self._stopped is not None:
            shown = text[: end - len(held)]
            self._num_tokens_at_stop = next(
                count
                for length, count in enumerate(counts, start=1)
                if length == len(ids) or self._tokenizer.text_behind(anchor, ids[:length]).startswith(shown)
            )
        return safe

    def _cut(self, window: str) -> tuple[str, int]:
        """What of ``window`` may be shown, and where a stop string in it ends; the rest is held."""
        found = [(window.find(stop), stop) for stop in self._stops]
        hits = [_Hit(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if hits:
            hit = min(hits)
            self._stopped, self._held = hit.stop, ""
            return window[: hit.end if self._include_stop else hit.start], hit.end
        keep = max(_overlap(window, stop) for stop in self._stops)
        self._held = window[len(window) - keep :]
        self._run = bytearray(self._held.encode())
        return window[: len(window) - keep], 0

    def _stop_at_special(self, stop: str) -> str:
        before = self._settle()
        if self._stopped is None:
            before, self._held = before + self._held + (stop if self._include_stop else ""), ""
            self._stopped, self._num_tokens_at_stop = stop, self._count
        return before


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop``."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def anchor_of(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool) -> int | None:
    """What a text that goes on behind ``ids`` comes ``after``; None where they show nothing.

    It is the last of them that stands for whole characters: a decoder would join bytes on both sides of the border.
    """
    for token_id in reversed(ids):
        piece = tokenizer.piece(token_id)
        hidden = not piece.known or (piece.special and skip_special_tokens)
        if not hidden and piece.byte is None and not piece.text.endswith(REPLACEMENT):
            return token_id
    return None
