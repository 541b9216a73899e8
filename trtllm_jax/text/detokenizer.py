"""Incremental detokenization that never emits part of a character or the beginning of a stop string."""

from collections.abc import Sequence
from typing import NamedTuple

from trtllm_jax.text.tokenizer import REPLACEMENT, Tokenizer

# A UTF-8 character has at most four bytes, and a token has at least one.
_MAX_CHARACTER_TOKENS = 4


class _StopMatch(NamedTuple):
    end: int
    start: int
    stop: str


class IncrementalDetokenizer:
    """The text of one generated sequence, emitted as soon as no later token can change it.

    Without a stop string, all text emitted until ``finish`` equals ``tokenizer.decode`` of all appended ids. As in
    TensorRT-LLM the prompt has no influence: a sentencepiece model's text starts without the leading space. If
    ``after`` is an id, the text is the one that follows this id.
    The stop string that ends first is applied, and of several with the same end the longest; the result does not depend
    on how ids are grouped into ``append`` calls. With ``skip_special_tokens`` a stop string that is a special token
    still stops. The cost per token is constant, because one token of context suffices to decode the following ones as
    the decoder would decode them in place.
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
        self._emitted: list[str] = []
        self._held = ""
        self._anchor = after
        self._pending: list[int] = []
        self._pending_counts: list[int] = []
        # The bytes of the held text and of the pending ids, in which a stop string may end; None if they are no text.
        self._byte_window: bytearray | None = bytearray()
        self._count = 0
        self._stopped: str | None = None
        self._num_tokens_at_stop: int | None = None

    @property
    def text(self) -> str:
        """All text emitted so far."""
        self._emitted = ["".join(self._emitted)]
        return self._emitted[0]

    @property
    def stopped(self) -> str | None:
        """The stop string that was found; further ids are ignored."""
        return self._stopped

    @property
    def num_tokens_at_stop(self) -> int | None:
        """The number of appended ids up to the one that completed the stop string."""
        return self._num_tokens_at_stop

    def append(self, ids: Sequence[int]) -> str:
        """The text that can be emitted after ``ids``, possibly empty."""
        return self._emit("".join([self._advance(token_id) for token_id in ids]))

    def finish(self) -> str:
        """The remaining text after the last id, with U+FFFD for an incomplete character."""
        if self._stopped is not None:
            return ""
        rest = self._decode_pending()
        if self._stopped is None:
            rest, self._held = rest + self._held, ""
        return self._emit(rest)

    def _emit(self, text: str) -> str:
        if text:
            self._emitted.append(text)
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
            return self._decode_pending() if self._byte_completes_stop(piece.byte) else ""
        if piece.text.endswith(REPLACEMENT) and self._ends_inside_character():
            return ""
        return self._decode_pending()

    def _byte_completes_stop(self, byte: int) -> bool:
        """Whether this byte completes a stop string, even if further bytes could make the byte sequence invalid."""
        if not self._stops or self._byte_window is None:
            return False
        self._byte_window.append(byte)
        if not self._byte_window.endswith(self._stop_bytes):
            return False
        window = self._held + self._tokenizer.text_behind(self._anchor, self._pending)
        if any(stop in window for stop in self._stops):
            return True
        self._byte_window = None
        return False

    def _ends_inside_character(self) -> bool:
        return self._tokenizer.decode(self._pending[-_MAX_CHARACTER_TOKENS:], False).endswith(REPLACEMENT)

    def _decode_pending(self) -> str:
        """Decode the pending ids after the anchor, without which they would be decoded as the start of a text."""
        if not self._pending:
            return ""
        ids, counts, anchor = self._pending, self._pending_counts, self._anchor
        self._pending, self._pending_counts = [], []
        text = self._tokenizer.text_behind(anchor, ids)
        self._anchor = ids[-1]
        if not self._stops:
            return text
        held = self._held
        safe, end = self._cut_at_stop(held + text)
        if self._stopped is not None:
            before_stop = text[: end - len(held)]
            self._num_tokens_at_stop = next(
                count
                for length, count in enumerate(counts, start=1)
                if length == len(ids) or self._tokenizer.text_behind(anchor, ids[:length]).startswith(before_stop)
            )
        return safe

    def _cut_at_stop(self, window: str) -> tuple[str, int]:
        """The part of ``window`` that can be emitted, and the end of a stop string in it; the remainder is held."""
        found = [(window.find(stop), stop) for stop in self._stops]
        matches = [_StopMatch(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if matches:
            match = min(matches)
            self._stopped, self._held = match.stop, ""
            return window[: match.end if self._include_stop else match.start], match.end
        keep = max(_overlap(window, stop) for stop in self._stops)
        self._held = window[len(window) - keep :]
        self._byte_window = bytearray(self._held.encode())
        return window[: len(window) - keep], 0

    def _stop_at_special(self, stop: str) -> str:
        before = self._decode_pending()
        if self._stopped is None:
            before, self._held = before + self._held + (stop if self._include_stop else ""), ""
            self._stopped, self._num_tokens_at_stop = stop, self._count
        return before


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of ``text`` that is a prefix of ``stop``."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def anchor_of(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool) -> int | None:
    """The id for ``after`` in a text that continues ``ids``; None where none of them has text.

    It is the last id that decodes to complete characters, because a decoder would join partial characters on both sides
    of the border.
    """
    for token_id in reversed(ids):
        piece = tokenizer.piece(token_id)
        hidden = not piece.known or (piece.special and skip_special_tokens)
        if not hidden and piece.byte is None and not piece.text.endswith(REPLACEMENT):
            return token_id
    return None
