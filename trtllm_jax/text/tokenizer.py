"""Text to token ids and back, with the Rust backend of a fast transformers tokenizer."""

import copy
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from checkpoints.error_text import one_line
from checkpoints.rust_errors import is_failure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\ufffd"
"""The character that decoders write for bytes that are not valid UTF-8."""

MAX_ID = 1 << 24

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Piece(NamedTuple):
    """What a single token id decodes to.

    Attributes:
        text: its decoding on its own.
        known: whether the vocabulary has it.
        special: whether skip_special_tokens drops it.
        byte: the byte of a byte-fallback token, whose text depends on the adjacent byte tokens.
        fixed: whether its text is the same after any complete character.
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

    ValueError: ``hf`` is a slow tokenizer without a Rust backend, or has ids far beyond any vocabulary.
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
            # The copy below lists every unused id, which would take gigabytes.
            raise ValueError(
                f"the tokenizer has the id {highest}; ids up to {MAX_ID} are read. Check its tokenizer.json"
            )
        self.hf = hf
        self._highest_id = highest
        from tokenizers.decoders import ByteLevel

        self._backend = _call_backend("be copied", copy.deepcopy, backend)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = backend.encode_special_tokens
        added = self._backend.get_added_tokens_decoder()
        self._added_tokens = {token_id: token.content for token_id, token in added.items()}
        self._special_tokens = {token_id: token.content for token_id, token in added.items() if token.special}
        self._pieces: dict[int, Piece] = {}
        # A byte-level decoder concatenates the bytes of the tokens, independently of their neighbours.
        self._is_byte_level = isinstance(self._backend.decoder, ByteLevel)

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
        """The texts of the added tokens, special ones and others, which encoding finds before all other tokens."""
        return self._added_tokens

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def highest_id(self) -> int:
        """The highest token id; ids below it may be unused. -1 where there are no tokens."""
        return self._highest_id

    def encode(self, text: str, add_special_tokens: bool = True, truncate_to: int | None = None) -> list[int]:
        """The ids of ``text``, or the last ``truncate_to`` of them. ValueError: ``text`` is not valid Unicode."""
        _check_unicode(text)
        ids: list[int] = _call_backend(
            "encode the prompt", self._backend.encode, text, add_special_tokens=add_special_tokens
        ).ids
        return ids if truncate_to is None else ids[-truncate_to:]

    def encode_whole(
        self, text: str, pair: str | None = None, add_special_tokens: bool = True, truncate_to: int | None = None
    ) -> tuple[list[int], list[int]]:
        """The ids of a text or of a pair, and the segment of each id; no segments where the model has none.

        With ``truncate_to`` they are cut at the end to have at most that many ids, special tokens included; of a pair
        the longer text first. ValueError: a text is not valid Unicode, or the special tokens alone are more.
        """
        texts = [text] if pair is None else [text, pair]
        fields = ("prompt",) if pair is None else ("prompt.prompt", "prompt.text_pair")
        for field, each in zip(fields, texts, strict=True):
            _check_unicode(each, field)
        parts = [
            _call_backend("encode the prompt", self._backend.encode, each, add_special_tokens=False) for each in texts
        ]
        if truncate_to is not None:
            special = self._backend.num_special_tokens_to_add(pair is not None) if add_special_tokens else 0
            if truncate_to < special:
                raise ValueError(
                    f"truncate_prompt_tokens = {truncate_to} has no room for the {special} special tokens that the "
                    "tokenizer adds: raise it, or leave them out with add_special_tokens=False"
                )
            shares = _shares([len(part.ids) for part in parts], truncate_to - special)
            for part, length in zip(parts, shares, strict=True):
                part.truncate(length)
        joined = self._backend.post_process(*parts, *[None] * (2 - len(parts)), add_special_tokens)
        return joined.ids, joined.type_ids if "token_type_ids" in self.hf.model_input_names else []

    def spans(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, int]]:
        """The start and end in ``text`` of each id that ``encode`` returns; (0, 0) for ids that encoding adds."""
        found = _call_backend("encode the prompt", self._backend.encode, text, add_special_tokens=add_special_tokens)
        spans: list[tuple[int, int]] = found.offsets
        return spans

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; invalid bytes become U+FFFD, and ids outside the vocabulary are skipped.

        There is no ``spaces_between_special_tokens``: fast tokenizers never add such spaces.
        """
        text: str = _call_backend(
            "decode the answer", self._backend.decode, ids, skip_special_tokens=skip_special_tokens
        )
        return text

    def text_behind(self, before: int | None, ids: Sequence[int]) -> str:
        """The text of ``ids`` after the id ``before``, or at a text's start if it is None, with special tokens."""
        if len(ids) == 1 and (piece := self.piece(ids[0])).fixed:
            return piece.text
        if before is None:
            return self.decode(ids, skip_special_tokens=False)
        return self.decode([before, *ids], skip_special_tokens=False)[len(self.piece(before).text) :]

    def token(self, token_id: int) -> str | None:
        """The token in the vocabulary's spelling, None for an unused id."""
        token: str | None = None if token_id < 0 else self._backend.id_to_token(token_id)
        return token

    def piece(self, token_id: int) -> Piece:
        """The piece of ``token_id``; cached, so that a hot loop pays for one dict look-up."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._look_up(token_id)
        return piece

    def _look_up(self, token_id: int) -> Piece:
        token = self.token(token_id)
        if token is None:
            return Piece("", known=False)
        text = self.decode([token_id], skip_special_tokens=False)
        # Only a byte-fallback decoder decodes "<0x41>" to anything but itself.
        match = _BYTE_TOKEN.fullmatch(token) if text != token else None
        fixed = self._is_byte_level and REPLACEMENT not in text
        byte = int(match[1], base=16) if match else None
        return Piece(text, special=token_id in self._special_tokens, byte=byte, fixed=fixed)


def _call_backend(task: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The result of the call; ValueError if the Rust backend fails, so that only the request concerned fails."""
    try:
        return call(*args, **options)
    except BaseException as error:
        if not is_failure(error):
            raise
        reason = one_line(str(error))
        raise ValueError(f"the tokenizer cannot {task}: {reason}. Check its files or choose another one") from error


def _check_unicode(text: str, field: str = "prompt") -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{field} holds {text[error.start]!r} at position {error.start}, half of a surrogate pair: "
            "remove it or decode the text with errors='replace'"
        ) from None


def _shares(lengths: Sequence[int], room: int) -> list[int]:
    """What remains of one or two texts of these lengths in so much room, as transformers' "longest_first" cuts them."""
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    shorter, longer = sorted(lengths)
    if shorter + longer > room:
        longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return [shorter, longer] if lengths[0] <= lengths[1] else [longer, shorter]
