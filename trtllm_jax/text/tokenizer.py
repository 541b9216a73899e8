"""Text to token ids and back, over the Rust half of a transformers tokenizer."""

import copy
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from checkpoints.rust_errors import is_failure
from checkpoints.shown import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no character."""

MAX_ID = 1 << 24

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Piece(NamedTuple):
    """One token id seen alone.

    ``text``: its decoding; ``known``: the vocabulary has it; ``special``: skip_special_tokens drops it;
    ``byte``: a byte-fallback token's byte, whose text depends on the whole run of byte tokens around it;
    ``fixed``: its text is the same after any other whole character.
    """

    text: str
    known: bool = True
    special: bool = False
    byte: int | None = None
    fixed: bool = False


class Tokenizer:
    """A thread-safe view of a fast transformers tokenizer, which stays reachable as ``hf`` (chat templates).

    transformers switches padding and truncation of its Rust tokenizer on every call, and threads then see each other's
    settings or "Already borrowed". This class works on a private copy whose settings never change.

    ValueError: ``hf`` has no Rust half (a slow tokenizer), or ids far beyond any vocabulary.
    """

    def __init__(self, hf: "PreTrainedTokenizerFast") -> None:
        backend = getattr(hf, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"tokenizer = {type(hf).__name__} has no fast (Rust) implementation: pass a fast transformers "
                "tokenizer or the directory that holds its tokenizer.json"
            )
        highest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest > MAX_ID:
            # The copy below lists every id that is left out: gigabytes.
            raise ValueError(
                f"the tokenizer has the id {highest}; ids up to {MAX_ID} are read. Check its tokenizer.json"
            )
        self.hf = hf
        self._highest_id = highest
        from tokenizers.decoders import ByteLevel

        self._backend = _try("be copied", copy.deepcopy, backend)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = backend.encode_special_tokens
        added = self._backend.get_added_tokens_decoder()
        self._added_tokens = {token_id: token.content for token_id, token in added.items()}
        self._special_tokens = {token_id: token.content for token_id, token in added.items() if token.special}
        self._pieces: dict[int, Piece] = {}
        # A byte-level decoder strings bytes together and looks at nothing else.
        self._by_bytes = isinstance(self._backend.decoder, ByteLevel)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a sequence according to the tokenizer; a model's generation config may name more."""
        return () if self.hf.eos_token_id is None else (self.hf.eos_token_id,)

    @property
    def special_tokens(self) -> dict[int, str]:
        """The texts of the ids that skip_special_tokens drops."""
        return self._special_tokens

    @property
    def added_tokens(self) -> dict[int, str]:
        """The texts of the ids that are found in a text before anything else: special ones and others."""
        return self._added_tokens

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def highest_id(self) -> int:
        """The highest of the tokens' ids, between which there may be gaps; -1 where there are no tokens."""
        return self._highest_id

    def encode(self, text: str, add_special_tokens: bool = True, truncate_to: int | None = None) -> list[int]:
        """The ids of ``text``; of them the last ``truncate_to``. ValueError: ``text`` is no valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt holds {text[error.start]!r} at position {error.start}, half of a surrogate pair: "
                "remove it or decode the text with errors='replace'"
            ) from None
        ids: list[int] = _try(
            "encode the prompt", self._backend.encode, text, add_special_tokens=add_special_tokens
        ).ids
        return ids if truncate_to is None else ids[-truncate_to:]

    def spans(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, int]]:
        """For each id that ``encode`` gives where its characters begin and end in ``text``; (0, 0) for added ones."""
        found = _try("encode the prompt", self._backend.encode, text, add_special_tokens=add_special_tokens)
        spans: list[tuple[int, int]] = found.offsets
        return spans

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are no character become U+FFFD, ids outside the vocabulary nothing.

        There is no ``spaces_between_special_tokens``: fast tokenizers never add such spaces.
        """
        text: str = _try("decode the answer", self._backend.decode, ids, skip_special_tokens=skip_special_tokens)
        return text

    def text_behind(self, before: int | None, ids: Sequence[int]) -> str:
        """What ``ids`` add to a text that ends in ``before``, special tokens included; None: they begin a text."""
        if len(ids) == 1 and (piece := self.piece(ids[0])).fixed:
            return piece.text
        if before is None:
            return self.decode(ids, skip_special_tokens=False)
        return self.decode([before, *ids], skip_special_tokens=False)[len(self.piece(before).text) :]

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it, None for an id that has none."""
        token: str | None = None if token_id < 0 else self._backend.id_to_token(token_id)
        return token

    def piece(self, token_id: int) -> Piece:
        """What ``token_id`` is on its own; remembered, so that a hot loop pays one dict look-up."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._look_up(token_id)
        return piece

    def _look_up(self, token_id: int) -> Piece:
        token = self.token(token_id)
        if token is None:
            return Piece("", known=False)
        text = self.decode([token_id], skip_special_tokens=False)
        # Only a byte-fallback decoder turns "<0x41>" into something else than itself.
        match = _BYTE_TOKEN.fullmatch(token) if text != token else None
        fixed = self._by_bytes and REPLACEMENT not in text
        byte = int(match[1], base=16) if match else None
        return Piece(text, special=token_id in self._special_tokens, byte=byte, fixed=fixed)


def _try(task: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The call's result; ValueError where the Rust half fails, so that one request fails as for any wrong input."""
    try:
        return call(*args, **options)
    except BaseException as error:
        if not is_failure(error):
            raise
        reason = one_line(str(error))
        raise ValueError(f"the tokenizer cannot {task}: {reason}. Check its files or choose another one") from error
