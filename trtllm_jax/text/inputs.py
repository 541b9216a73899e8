"""The accepted forms of a prompt, and their token ids."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from trtllm_jax.text.tokenizer import Tokenizer

PromptInputs = str | Sequence[int] | Mapping[str, Any]

_DICT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_WHOLE_DICT_KEYS = ("prompt", "text_pair", "prompt_token_ids", "token_type_ids")


class Prompt(NamedTuple):
    """One prompt.

    Attributes:
        text: if it was a text.
        ids: its token ids.
        salt: what separates its cached prefix from others.
        token_types: the segment of each id where it is a pair of texts; empty where it is one.
    """

    text: str | None
    ids: list[int]
    salt: bytes = b""
    token_types: Sequence[int] = ()


class Encoding(NamedTuple):
    """How prompts are encoded.

    Attributes:
        tokenizer: None if prompts are given as ids.
        vocab: the number of the model's token ids.
        add_special_tokens: whether the tokenizer adds special tokens to a text, such as the one at its start.
        truncate_to: the number of tokens that are kept, those at a prompt's end; None for all.
        whole: whether the model computes whole texts: it takes pairs, and of a text the first tokens are kept, with the
            special tokens around them.
    """

    tokenizer: Tokenizer | None
    vocab: int
    add_special_tokens: bool = True
    truncate_to: int | None = None
    whole: bool = False


def is_single(inputs: Any) -> bool:
    """Whether `inputs` is one prompt: a string, a list of ids, or a dict. ValueError for an empty list."""
    if isinstance(inputs, str | Mapping) or _is_ids(inputs):
        return True
    if isinstance(inputs, Sequence) and not isinstance(inputs, bytes | bytearray):
        if not inputs:
            raise ValueError("inputs is an empty list; give at least one prompt")
        if not any(isinstance(item, int) for item in inputs):
            return False
    raise TypeError(f"The inputs must be type str or list of int, or a list of those; got {_type_name(inputs)}")


def read_prompt(inputs: Any, encoding: Encoding) -> Prompt:
    """The prompt's ids. TypeError or ValueError names what is wrong with it."""
    if isinstance(inputs, str):
        return _of_text(inputs, None, encoding)
    if isinstance(inputs, Mapping):
        return _read_dict(inputs, encoding)
    if _is_ids(inputs):
        return Prompt(None, _checked(inputs, encoding))
    raise TypeError(f"The inputs must be type str or list of int; got {_type_name(inputs)}")


def check_ids(field: str, ids: Sequence[int], vocab: int, tokenizer: Tokenizer | None = None) -> None:
    """ValueError, which names `field` and the token, if one of `ids` has no row in the model's embedding.

    A tokenizer may produce such ids: those of tokens that were added to it and not to the model.
    """
    if not ids or (min(ids) >= 0 and max(ids) < vocab):
        return
    wrong = next(token for token in ids if not 0 <= token < vocab)
    text = tokenizer.token(wrong) if tokenizer is not None else None
    named = "" if text is None else f", {text!r} of the tokenizer"
    raise ValueError(f"{field} holds {wrong}{named}; ids of this model are 0 to {vocab - 1}")


def _read_dict(inputs: Mapping[str, Any], encoding: Encoding) -> Prompt:
    known = _WHOLE_DICT_KEYS if encoding.whole else _DICT_KEYS
    unknown = sorted(set(inputs) - set(known))
    if unknown:
        raise ValueError(f"a prompt dict holds {', '.join(unknown)}; supported here: {', '.join(known)}")
    salt = inputs.get("cache_salt") or ""
    if not isinstance(salt, str):
        raise TypeError(f"cache_salt must be a str; got {_type_name(salt)}")
    text, ids = inputs.get("prompt"), inputs.get("prompt_token_ids")
    if ids is not None:
        if not _is_ids(ids):
            raise TypeError(f"prompt_token_ids must be a list of int; got {_type_name(ids)}")
        if inputs.get("text_pair") is not None:
            raise ValueError("text_pair goes with a text; a pair that is given as ids has token_type_ids")
        kept, types = _checked(ids, encoding), _types(inputs.get("token_type_ids"), len(ids))
        return Prompt(text, kept, _salt_key(salt), types[: len(kept)])
    if inputs.get("token_type_ids") is not None:
        raise ValueError("token_type_ids goes with prompt_token_ids; a pair of texts has text_pair")
    if not isinstance(text, str):
        raise ValueError('a prompt dict needs "prompt" (a str) or "prompt_token_ids" (a list of int)')
    pair = inputs.get("text_pair")
    if not isinstance(pair, str | None):
        raise TypeError(f"text_pair must be a str; got {_type_name(pair)}")
    return _of_text(text, pair, encoding)._replace(salt=_salt_key(salt))


def _types(types: Any, length: int) -> list[int]:
    if types is None:
        return []
    if not _is_ids(types) or len(types) != length or not set(types) <= {0, 1}:
        raise ValueError("token_type_ids must be a list of 0 or 1, one for each of prompt_token_ids")
    return list(types)


def _salt_key(salt: str) -> bytes:
    """The start of a chain of block hashes, a sha512: no salt can equal the sha256 of a block."""
    return hashlib.sha512(salt.encode()).digest() if salt else b""


def _of_text(text: str, pair: str | None, encoding: Encoding) -> Prompt:
    tokenizer = encoding.tokenizer
    if tokenizer is None:
        raise ValueError("a text prompt needs a tokenizer; give token ids, or load without skip_tokenizer_init=True")
    types: Sequence[int] = ()
    if encoding.whole:
        ids, types = tokenizer.encode_whole(text, pair, encoding.add_special_tokens, encoding.truncate_to)
    else:
        ids = tokenizer.encode(text, encoding.add_special_tokens, encoding.truncate_to)
    if not ids:
        raise ValueError(f"the prompt {text!r} has no tokens; give some text")
    if pair is not None and max(ids) >= encoding.vocab:
        for field, each in (("prompt.prompt", text), ("prompt.text_pair", pair)):
            check_ids(field, tokenizer.encode(each, add_special_tokens=False), encoding.vocab, tokenizer)
    check_ids("prompt", ids, encoding.vocab, tokenizer)
    return Prompt(text, ids, token_types=types if pair is not None else ())


def _is_ids(inputs: Any) -> TypeGuard[Sequence[int]]:
    if not isinstance(inputs, Sequence) or isinstance(inputs, bytes | bytearray) or not inputs:
        return False
    return _all_of_type_int(inputs) or all(_is_int(item) for item in inputs)


def _all_of_type_int(ids: Sequence[Any]) -> bool:
    """Whether the type of every item is int itself, which is a quick check for long prompts."""
    return set(map(type, ids)) == {int}


def _is_int(item: Any) -> bool:
    # numpy integers are ids too; bool is a subclass of int.
    return hasattr(item, "__index__") and not isinstance(item, bool)


def _checked(ids: Sequence[int], encoding: Encoding) -> list[int]:
    plain = list(ids) if _all_of_type_int(ids) else [int(token) for token in ids]
    check_ids("prompt_token_ids", plain, encoding.vocab, encoding.tokenizer)
    if encoding.truncate_to is None:
        return plain
    return plain[: encoding.truncate_to] if encoding.whole else plain[-encoding.truncate_to :]


def _type_name(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"{type(value).__name__} of {', '.join(sorted({type(item).__name__ for item in value})) or 'nothing'}"
    return type(value).__name__
