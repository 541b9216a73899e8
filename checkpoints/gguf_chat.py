"""The chat templates of a GGUF file, and its end-of-turn tokens."""

from collections.abc import Mapping
from enum import IntEnum

from checkpoints.error_text import short_repr
from checkpoints.gguf_file import GgufFile


class TokenType(IntEnum):
    """The values of `tokenizer.ggml.token_type` that are read here."""

    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


_TEMPLATE = "tokenizer.chat_template"

_END_OF_GENERATION = frozenset(
    (
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>",
        "<turn|>", "<end_of_utterance>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
        "<EOT>", "_<EOT>", "\u2581<EOT>", "[EOT]", "[EOS]", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    )
)  # fmt: skip
"""End-of-generation tokens by name: those of `special_eog_ids` in llama.cpp's llama-vocab.cpp, and others."""

_END_OF_MESSAGE = {"<|end|>": ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|calls|>"})}
"""Tokens that end a message and no turn in vocabularies with certain others, where a turn has several messages."""


def chat_templates(file: GgufFile) -> str | dict[str, str] | None:
    """The file's template; several as a dict by name, with "default" for the one without a name; None for none.

    ValueError names a template that is not a text.
    """
    found = {key: value for key, value in file.metadata.items() if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")}
    for key, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"{file.path}: {key!r} is {short_repr(value)}; it must be a str")
    if found.keys() <= {_TEMPLATE}:
        return found.get(_TEMPLATE)
    return {key.removeprefix(_TEMPLATE).removeprefix(".") or "default": value for key, value in found.items()}


def turn_ends(file: GgufFile) -> Mapping[str, int]:
    """The end-of-turn tokens with their ids, by name: control tokens, and other tokens that a template contains.

    Early converters state one end-of-text token at most. {} where the metadata has no tokens.
    """
    tokens, types = (file.metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, list):
        return {}
    templates = [value for key, value in file.metadata.items() if key.startswith(_TEMPLATE) and isinstance(value, str)]
    ends = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if isinstance(token, str)
        and token in _END_OF_GENERATION
        and (kind == TokenType.CONTROL or any(token in template for template in templates))
    }
    for name, others in _END_OF_MESSAGE.items():
        if any(tokens_present <= ends.keys() for tokens_present in others):
            ends.pop(name, None)
    return ends
