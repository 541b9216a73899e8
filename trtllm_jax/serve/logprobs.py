"""Log-probabilities in OpenAI's two forms, and tokens as the text and bytes that they stand for."""

from collections.abc import Mapping, Sequence
from typing import Any

from trtllm_jax.outputs import Logprob
from trtllm_jax.tokenizer import REPLACEMENT, Tokenizer

_LEAST = -9999.0
"""What OpenAI reports of tokens that cannot come: JSON has no infinity."""


def _byte_alphabet() -> dict[str, int]:
    """The bytes behind the characters that byte-level vocabularies write for them (GPT-2's alphabet)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


class TokenTexts:
    """What single tokens look like."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        """The token's text; U+FFFD in place of a part of a character."""
        if self._tokenizer is None:
            return f"token_id:{token}"
        return self._tokenizer.piece(token).text

    def utf8(self, token: int) -> bytes:
        """The token's bytes, whole characters or not."""
        text = self.text(token)
        if self._tokenizer is None or REPLACEMENT not in text:
            return text.encode()
        byte = self._tokenizer.piece(token).byte
        if byte is not None:
            return bytes([byte])
        stored = self._tokenizer.hf.convert_ids_to_tokens(token) or ""
        if not all(character in _ALPHABET for character in stored):
            return text.encode()
        return bytes(_ALPHABET[character] for character in stored)


Positions = Sequence[Mapping[int, Logprob]]


def for_completions(
    texts: TokenTexts, tokens: Sequence[int], positions: Positions, count: int, offset: int
) -> dict[str, Any]:
    """Four parallel lists; `offset` is where the first token's text begins. A first prompt token has no values."""
    names = [texts.text(token) for token in tokens]
    offsets = []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    known = [at if token in at else None for token, at in zip(tokens, positions, strict=True)]
    return {
        "tokens": names,
        "token_logprobs": [_number(at[token]) if at else None for token, at in zip(tokens, known, strict=True)],
        "top_logprobs": [
            _best_by_text(texts, at, token, count) if at else None for token, at in zip(tokens, known, strict=True)
        ],
        "text_offset": offsets,
    }


def _best_by_text(texts: TokenTexts, at: Mapping[int, Logprob], token: int, count: int) -> dict[str, float]:
    """The `count` likeliest, and the token itself; of several tokens with one text the likeliest counts."""
    best: dict[str, float] = {}
    for one in [*_likeliest(at, count), token]:
        best.setdefault(texts.text(one), _number(at[one]))
    return best


def for_chat(texts: TokenTexts, tokens: Sequence[int], positions: Positions, count: int) -> dict[str, Any]:
    """One record a token, with the `count` likeliest ones in its place."""
    content = [
        {
            **_entry(texts, token, at[token]),
            "top_logprobs": [_entry(texts, one, at[one]) for one in _likeliest(at, count)],
        }
        for token, at in zip(tokens, positions, strict=True)
    ]
    return {"content": content, "refusal": None}


def _entry(texts: TokenTexts, token: int, value: Logprob) -> dict[str, Any]:
    return {"token": texts.text(token), "logprob": _number(value), "bytes": list(texts.utf8(token))}


def _likeliest(at: Mapping[int, Logprob], count: int) -> list[int]:
    return [token for token, value in at.items() if value.rank is not None and value.rank <= count][:count]


def _number(value: Logprob) -> float:
    return max(value.logprob, _LEAST)
