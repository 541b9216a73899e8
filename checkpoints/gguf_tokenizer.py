"""The tokenizer inside a GGUF file, built with the tokenizers package."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from checkpoints.error_text import short_repr
from checkpoints.gguf_chat import TokenType, chat_templates, turn_ends
from checkpoints.gguf_file import GgufFile
from checkpoints.rust_errors import as_value_error

_REMEDY = "Give the folder or hub name of the model's original tokenizer instead"

_SPACE = "\u2581"  # how sentencepiece writes a space

# Finding a piece's merges takes time with the square of its length. Real vocabularies stay far below both bounds.
_LONGEST_PIECE = 128
_MERGES_PER_PIECE = 16

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Pre(NamedTuple):
    """A pre-tokeniser: patterns that split the text one after another, and what llama.cpp assumes together with it."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is never put together from merges
    add_bos: bool = False


_PLAIN = _Pre((_GPT2,))
_DIGITS = _Pre((r"\p{N}", _GPT2))
_LLAMA = _Pre((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN = _Pre((_QWEN2,))

# By `tokenizer.ggml.pre`, as in llama_vocab::impl::load and llm_tokenizer_bpe of llama.cpp's llama-vocab.cpp.
_PRE: Mapping[str, _Pre] = {
    "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), _PLAIN),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2"), _LLAMA),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _Pre((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), _QWEN),
    "tekken": _Pre((_TEKKEN,), ignore_merges=True, add_bos=True),
}


def load_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The file's tokenizer, with its special tokens and chat templates.

    Byte-level BPE (`tokenizer.ggml.model` "gpt2") and sentencepiece BPE ("llama") are read; ValueError names any other
    model or pre-tokeniser, and metadata that no tokenizer can be built from.
    """
    vocabulary = _Vocabulary(file)
    with as_value_error(file.path, "has a tokenizer that cannot be built", _REMEDY):
        return _build(file, vocabulary)


def _build(file: GgufFile, vocabulary: "_Vocabulary") -> PreTrainedTokenizerFast:
    model = vocabulary.get("ggml.model")
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(vocabulary)
    elif model == "llama":
        tokenizer, add_bos = _sentencepiece(vocabulary)
    else:
        raise ValueError(
            f"{vocabulary.path} has the tokenizer model {short_repr(model)}; supported: gpt2, llama. {_REMEDY}"
        )
    # Some converters gave the end of a turn another type.
    control = dict.fromkeys([*vocabulary.of_type(TokenType.CONTROL), *turn_ends(file)])
    others = [token for token in vocabulary.of_type(TokenType.USER_DEFINED) if token not in control]
    tokenizer.add_special_tokens([_added(token, special=True) for token in control])
    tokenizer.add_tokens([_added(token, special=False) for token in others])
    special = {
        "bos_token": vocabulary.token("bos"),
        "eos_token": vocabulary.token("eos"),
        "unk_token": vocabulary.token("unknown"),
        "pad_token": vocabulary.token("padding"),
    }
    first = special["bos_token"] if vocabulary.optional("ggml.add_bos_token", bool, add_bos) else None
    last = special["eos_token"] if vocabulary.optional("ggml.add_eos_token", bool, False) else None
    tokenizer.post_processor = _surround(tokenizer, first, last)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_templates(file),
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
    )


class _Vocabulary:
    """The `tokenizer.*` metadata of a file."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.path = file.path
        self.tokens: list[str] = self.list_of("ggml.tokens", str) if self.get("ggml.tokens") else []
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if not self.tokens or len(self.ids) != len(self.tokens):
            state = "no tokens" if not self.tokens else "the same token twice"
            raise ValueError(f"{file.path}: 'tokenizer.ggml.tokens' has {state}. {_REMEDY}")

    def get(self, key: str) -> Any:
        return self._file.metadata.get(f"tokenizer.{key}")

    def optional(self, key: str, kind: type, default: Any) -> Any:
        value = self.get(key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(
                f"{self.path}: 'tokenizer.{key}' is {short_repr(value)}; it must be a {kind.__name__}. {_REMEDY}"
            )
        return default if value is None else value

    def list_of(self, key: str, kind: type) -> list[Any]:
        values = self.get(key)
        if values is None:
            raise ValueError(f"{self.path} has no 'tokenizer.{key}'. {_REMEDY}")
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise ValueError(
                f"{self.path}: 'tokenizer.{key}' is {short_repr(values)}; it must be an array of {kind.__name__}. "
                f"{_REMEDY}"
            )
        return values

    def per_token(self, key: str, kind: type) -> list[Any]:
        values = self.list_of(key, kind)
        if len(values) != len(self.tokens):
            found = f"{len(values)} entries for {len(self.tokens)} tokens"
            raise ValueError(f"{self.path}: 'tokenizer.{key}' has {found}")
        return values

    def of_type(self, kind: TokenType) -> list[str]:
        types = self.per_token("ggml.token_type", int)
        return [token for token, its_type in zip(self.tokens, types, strict=True) if its_type == kind]

    def token(self, role: str) -> str | None:
        index = self._file.integer(f"tokenizer.ggml.{role}_token_id")
        if index is None:
            return None
        if not 0 <= index < len(self.tokens):
            raise ValueError(f"{self.path}: 'tokenizer.ggml.{role}_token_id' is {index}, of {len(self.tokens)} tokens")
        return self.tokens[index]

    def pre(self) -> _Pre:
        name = self.optional("ggml.pre", str, "default")
        if name not in _PRE:
            raise ValueError(
                f"{self.path} has the pre-tokeniser {short_repr(name)}; supported: {', '.join(_PRE)}. {_REMEDY}"
            )
        return _PRE[name]


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    pre = vocabulary.pre()
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary.list_of("ggml.merges", str)]
    tokenizer = Tokenizer(BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    prefix = vocabulary.optional("ggml.add_space_prefix", bool, True)
    unknown = vocabulary.of_type(TokenType.UNKNOWN)
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary.ids,
            merges=_merges(vocabulary),
            unk_token=unknown[0] if unknown else vocabulary.token("unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces] if prefix else [spaces])
    restored = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*restored, decoders.Strip(" ", 1, 0)] if prefix else restored)
    return tokenizer, True


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The merges that a scored vocabulary implies: any two tokens whose union is a token, best score first."""
    ids, scores = vocabulary.ids, vocabulary.per_token("ggml.scores", float)
    longest = max(vocabulary.tokens, key=len)
    if len(longest) > _LONGEST_PIECE:
        raise ValueError(
            f"{vocabulary.path}: 'tokenizer.ggml.tokens' has {short_repr(longest)} of {len(longest)} characters; at "
            f"most {_LONGEST_PIECE} are read. {_REMEDY}"
        )
    every = (
        (-scores[i], ids[token[:cut]], ids[token[cut:]], token[:cut], token[cut:])
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    )
    most = _MERGES_PER_PIECE * len(ids)
    found = sorted(itertools.islice(every, most + 1))
    if len(found) > most:
        raise ValueError(f"{vocabulary.path}: 'tokenizer.ggml.tokens' implies more than {most} merges. {_REMEDY}")
    return [(left, right) for *_, left, right in found]


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _surround(tokenizer: Tokenizer, first: str | None, last: str | None) -> processors.TemplateProcessing:
    """What every encoded text starts and ends with."""
    before = [f"{first}:0"] if first is not None else []
    after = [f"{last}:0"] if last is not None else []
    again = [piece.replace(":0", ":1") for piece in before]
    return processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=[*before, "$A:0", *after, *again, "$B:1", *after],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last) if token is not None],
    )
