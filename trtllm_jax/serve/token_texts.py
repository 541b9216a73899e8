"""The text and the bytes of single tokens, and their positions in a text."""

import codecs
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from trtllm_jax.text.detokenizer import anchor_of
from trtllm_jax.text.tokenizer import REPLACEMENT, Tokenizer

_CACHE_SIZE = 1 << 16


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's alphabet)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


class TokenTexts:
    """The texts of single tokens after the token `before`, or at the beginning of a text where it is None."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._written = lru_cache(_CACHE_SIZE)(self._look_up)

    def token_bytes(self, token: int, before: int | None) -> bytes:
        """The bytes that the token adds to the text, which may end within a character; none for an unknown token."""
        if self.tokenizer is None or not (piece := self.tokenizer.piece(token)).known:
            return b""
        return self._written(token, None if piece.fixed else before)

    def name(self, token: int, position: "TokenPosition") -> str:
        """The token's text, or "bytes:" and its bytes where those are a part of a character, as OpenAI writes it."""
        if self.tokenizer is None or not (piece := self.tokenizer.piece(token)).known:
            return f"token_id:{token}"
        if piece.special and position.skips_special:
            return piece.text
        token_bytes = self.token_bytes(token, position.before)
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(map(_escape, token_bytes))

    def names(self, tokens: Iterable[int], position: "TokenPosition") -> dict[int, str]:
        """Distinct names of several tokens for one position; where two have the same text, the first one has it."""
        found: dict[str, int] = {}
        for token in dict.fromkeys(tokens):
            name = self.name(token, position)
            found[name if name not in found else f"token_id:{token}"] = token
        return {token: name for name, token in found.items()}

    def _look_up(self, token: int, before: int | None) -> bytes:
        assert self.tokenizer is not None
        piece = self.tokenizer.piece(token)
        if piece.byte is not None:
            return bytes([piece.byte])
        if REPLACEMENT in piece.text:
            stored = self.tokenizer.hf.convert_ids_to_tokens(token)
            if all(character in _ALPHABET for character in stored):
                return bytes(_ALPHABET[character] for character in stored)
        return self.tokenizer.text_behind(before, [token]).encode()


def _escape(byte: int) -> str:
    return chr(byte) if 0x20 <= byte < 0x7F and byte != ord("\\") else f"\\x{byte:02x}"


class TokenPosition(NamedTuple):
    """Where a token stands in a text.

    Attributes:
        before: the token that the text shows before it.
        skips_special: whether the text leaves special tokens out.
        token_bytes: what the token adds to the text, nothing where the text does not show it.
        offset: the character at which it begins, or within which it begins.
    """

    before: int | None
    skips_special: bool = True
    token_bytes: bytes = b""
    offset: int = 0


class PositionTracker:
    """Finds the positions of a text's tokens one after the other; later tokens do not change them.

    Args:
        texts: the texts of single tokens.
        skip_special_tokens: whether the text leaves special tokens out.
        before: the token that the text follows.
        offset: the character at which the text begins.
    """

    def __init__(
        self, texts: TokenTexts, skip_special_tokens: bool, before: int | None = None, offset: int = 0
    ) -> None:
        self._texts = texts
        self._skip = skip_special_tokens
        self._before = before
        self._length = offset
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._run: _ByteRun | None = None

    def add(self, token: int) -> TokenPosition:
        """The position of the next token."""
        tokenizer = self._texts.tokenizer
        if tokenizer is None:
            return TokenPosition(None, offset=self._length)
        piece = tokenizer.piece(token)
        if not piece.known or (piece.special and self._skip):
            return TokenPosition(self._before, self._skip, offset=self._offset(b""))
        token_bytes = self._texts.token_bytes(token, self._before)
        if piece.byte is None and self._run is not None:
            self._length += self._run.end()
            self._run = None
        position = TokenPosition(self._before, self._skip, token_bytes, self._offset(token_bytes))
        self._before = token
        if piece.byte is not None:
            self._run = self._run or _ByteRun()
            self._run.add(token_bytes)
        else:
            self._length += len(self._characters.decode(token_bytes))
        return position

    def _offset(self, token_bytes: bytes) -> int:
        if self._run is not None:
            return self._length + self._run.characters
        unfinished, _ = self._characters.getstate()
        goes_on = not token_bytes or token_bytes[0] & 0xC0 == 0x80  # a byte that continues a character
        return self._length + (1 if unfinished and not goes_on else 0)


class _ByteRun:
    """A run of byte-fallback tokens: its characters if all of it decodes, else U+FFFD for each token."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._bytes = 0
        self._whole = 0
        self._valid = True

    @property
    def characters(self) -> int:
        """The number of complete characters so far."""
        return self._whole if self._valid else self._bytes

    def add(self, token_bytes: bytes) -> None:
        self._bytes += 1
        try:
            self._whole += len(self._decoder.decode(token_bytes))
        except UnicodeDecodeError:
            self._valid = False

    def end(self) -> int:
        """The number of characters once no more tokens come."""
        unfinished, _ = self._decoder.getstate()
        return self._bytes if unfinished else self.characters


def prompt_positions(
    texts: TokenTexts, text: str, ids: Sequence[int], skip_special_tokens: bool, add_special_tokens: bool
) -> list[TokenPosition]:
    """The positions of a prompt's tokens in `text`, which the request gave, or which they decode to."""
    positions: list[TokenPosition] = []
    # The text of a request has no special tokens but those that somebody typed.
    for skip in (skip_special_tokens, True):
        positions = list(map(PositionTracker(texts, skip).add, ids))
        if b"".join(position.token_bytes for position in positions).decode(errors="replace") == text:
            return positions
    spans = texts.tokenizer.spans(text, add_special_tokens) if texts.tokenizer else []
    # Otherwise the ids are not those of the text: they are bytes of no character, or there is no text.
    return _align_to_spans(positions, spans, text) if len(spans) == len(ids) else positions


def _align_to_spans(
    positions: Sequence[TokenPosition], spans: Sequence[tuple[int, int]], text: str
) -> list[TokenPosition]:
    """The positions by the tokenizer's own spans, where it normalises the text before it splits it."""
    aligned, last = [], 0
    for position, (start, end) in zip(positions, spans, strict=True):
        token_bytes = position.token_bytes.decode(errors="replace")
        # Some leave out the space that a token begins with.
        spaced = start - (len(token_bytes) - len(token_bytes.lstrip()))
        offset = last if start == end else spaced if spaced >= 0 and text.startswith(token_bytes, spaced) else start
        aligned.append(position._replace(offset=offset))
        last = max(last, end)
    return aligned


def answer_positions(
    texts: TokenTexts, prompt: Sequence[int], offset: int, skip_special_tokens: bool
) -> PositionTracker:
    """The positions of an answer's tokens in a text that begins with the prompt's, which has `offset` characters."""
    before = None if texts.tokenizer is None else anchor_of(texts.tokenizer, prompt, skip_special_tokens)
    return PositionTracker(texts, skip_special_tokens, before, offset)
