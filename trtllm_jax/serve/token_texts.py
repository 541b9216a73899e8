"""Single tokens as the text and the bytes that they stand for, and where they are in a text."""

import codecs
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from trtllm_jax.text.detokenizer import anchor_of
from trtllm_jax.text.tokenizer import REPLACEMENT, Tokenizer

_REMEMBERED = 1 << 16


def _byte_alphabet() -> dict[str, int]:
    """The bytes behind the characters that byte-level vocabularies write for them (GPT-2's alphabet)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


class TokenTexts:
    """What single tokens look like where they stand: after `before`, or at the beginning of a text where it is None."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._written = lru_cache(_REMEMBERED)(self._look_up)

    def written(self, token: int, before: int | None) -> bytes:
        """The bytes that the token adds to the text, whole characters or not; none for one that does not exist."""
        if self.tokenizer is None or not (piece := self.tokenizer.piece(token)).known:
            return b""
        return self._written(token, None if piece.fixed else before)

    def name(self, token: int, place: "Place") -> str:
        """The token's text; as OpenAI writes it, bytes: and the bytes where that is a part of a character."""
        if self.tokenizer is None or not (piece := self.tokenizer.piece(token)).known:
            return f"token_id:{token}"
        if piece.special and place.skips_special:
            return piece.text
        written = self.written(token, place.before)
        try:
            return written.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(map(_shown, written))

    def names(self, tokens: Iterable[int], place: "Place") -> dict[int, str]:
        """The names of several tokens that may stand in one place, all different: the first with a text has it."""
        found: dict[str, int] = {}
        for token in dict.fromkeys(tokens):
            name = self.name(token, place)
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


def _shown(byte: int) -> str:
    return chr(byte) if 0x20 <= byte < 0x7F and byte != ord("\\") else f"\\x{byte:02x}"


class Place(NamedTuple):
    """Where a token is.

    ``before``: the token that the text shows before it; ``skips_special``: whether it leaves special ones out;
    ``written``: what it adds to the text, nothing where that does not show it; ``offset``: the character at which it
    begins, or the one that it begins within.
    """

    before: int | None
    skips_special: bool = True
    written: bytes = b""
    offset: int = 0


class Places:
    """The places of one text's tokens, told as they come: those that follow change nothing.

    Args:
        texts: what tokens look like.
        skip_special_tokens: whether the text leaves these out.
        before: the token that the text follows.
        offset: where it begins.
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

    def add(self, token: int) -> Place:
        """The place of the next token."""
        tokenizer = self._texts.tokenizer
        if tokenizer is None:
            return Place(None, offset=self._length)
        piece = tokenizer.piece(token)
        if not piece.known or (piece.special and self._skip):
            return Place(self._before, self._skip, offset=self._offset(b""))
        written = self._texts.written(token, self._before)
        if piece.byte is None and self._run is not None:
            self._length += self._run.end()
            self._run = None
        place = Place(self._before, self._skip, written, self._offset(written))
        self._before = token
        if piece.byte is not None:
            self._run = self._run or _ByteRun()
            self._run.add(written)
        else:
            self._length += len(self._characters.decode(written))
        return place

    def _offset(self, written: bytes) -> int:
        if self._run is not None:
            return self._length + self._run.characters
        unfinished, _ = self._characters.getstate()
        goes_on = not written or written[0] & 0xC0 == 0x80  # a byte that continues a character
        return self._length + (1 if unfinished and not goes_on else 0)


class _ByteRun:
    """Byte-fallback tokens in a row: characters if all of them are, else U+FFFD for each of them."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._bytes = 0
        self._whole = 0
        self._valid = True

    @property
    def characters(self) -> int:
        """How many whole ones there are so far."""
        return self._whole if self._valid else self._bytes

    def add(self, written: bytes) -> None:
        self._bytes += 1
        try:
            self._whole += len(self._decoder.decode(written))
        except UnicodeDecodeError:
            self._valid = False

    def end(self) -> int:
        """How many characters they are, if no more come."""
        unfinished, _ = self._decoder.getstate()
        return self._bytes if unfinished else self.characters


def places_in_prompt(
    texts: TokenTexts, text: str, ids: Sequence[int], skip_special_tokens: bool, add_special_tokens: bool
) -> list[Place]:
    """Where a prompt's tokens are in `text`, which was given or is what they say."""
    places: list[Place] = []
    # A text that was given has no special tokens but those that somebody typed.
    for skip in (skip_special_tokens, True):
        places = list(map(Places(texts, skip).add, ids))
        if b"".join(place.written for place in places).decode(errors="replace") == text:
            return places
    spans = texts.tokenizer.spans(text, add_special_tokens) if texts.tokenizer else []
    # Otherwise these are not the ids of this text, but bytes that are no characters, or there is no text.
    return _aligned(places, spans, text) if len(spans) == len(ids) else places


def _aligned(places: Sequence[Place], spans: Sequence[tuple[int, int]], text: str) -> list[Place]:
    """The same where the tokenizer changed the text before it cut it: by what it says of each token's origin."""
    aligned, last = [], 0
    for place, (start, end) in zip(places, spans, strict=True):
        written = place.written.decode(errors="replace")
        # Some leave out the space that a token begins with.
        spaced = start - (len(written) - len(written.lstrip()))
        offset = last if start == end else spaced if spaced >= 0 and text.startswith(written, spaced) else start
        aligned.append(place._replace(offset=offset))
        last = max(last, end)
    return aligned


def answer_places(texts: TokenTexts, prompt: Sequence[int], offset: int, skip_special_tokens: bool) -> Places:
    """The places of an answer's tokens in a text that begins with the prompt's, which has `offset` characters."""
    before = None if texts.tokenizer is None else anchor_of(texts.tokenizer, prompt, skip_special_tokens)
    return Places(texts, skip_special_tokens, before, offset)
