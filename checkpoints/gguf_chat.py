"""What a GGUF file says about conversations: its chat templates, and the tokens that end a turn."""

from collections.abc import Mapping
from enum import IntEnum

from checkpoints.error_text import short_repr
from checkpoints.gguf_file import GgufFile


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of a token, as far as it matters here."""

    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


_TEMPLATE = "tokenizer.chat_template"

_ENDS = frozenset(
    (
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>",
        "<turn|>", "<end_of_utterance>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
        "<EOT>", "_<EOT>", "\u2581<EOT>", "[EOT]", "[EOS]", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    )
)  # fmt: skip
"""Names of tokens that end a turn or a text: those of `special_eog_ids` in llama.cpp's llama-vocab.cpp, and others."""

_ENDS_OF_MESSAGES = {"<|end|>": ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|calls|>"})}
"""Names that end no turn beside certain others: there a turn has several messages."""


def chat_templates(file: GgufFile) -> str | dict[str, str] | None:
    """The file's template; a dict of several by name, "default" being the one without; None where there is none.

    ValueError names what is no text.
    """
    found = {key: value for key, value in file.metadata.items() if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")}
    for key, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"{file.path}: {key!r} is {short_repr(value)}; it must be a str")
    if found.keys() <= {_TEMPLATE}:
        return found.get(_TEMPLATE)
    return {key.removeprefix(_TEMPLATE).removeprefix(".") or "default": value for key, value in found.items()}


def turn_ends(file: GgufFile) -> Mapping[str, int]:
    """The tokens, with their ids, that end a turn by their names: control tokens, and others that a template writes.

    Files of early converters name one end of a text at most. Nothing is found where the metadata has no tokens.
    """
    tokens, types = (file.metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, list):
        return {}
    written = [value for key, value in file.metadata.items() if key.startswith(_TEMPLATE) and isinstance(value, str)]
    ends = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if isinstance(token, str)
        and token in _ENDS
        and (kind == TokenType.CONTROL or any(token in template for template in written))
    }
    for name, others in _ENDS_OF_MESSAGES.items():
        if any(beside <= ends.keys() for beside in others):
            ends.pop(name, None)
    return ends
