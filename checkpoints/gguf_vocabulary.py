"""The tokenizer's metadata in a GGUF file, checked value by value."""

from typing import Any

from checkpoints.error_text import short_repr
from checkpoints.gguf_chat import TokenType
from checkpoints.gguf_file import GgufFile
from checkpoints.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

REMEDY = "Give the folder or hub name of the model's original tokenizer instead"


class GgufVocabulary:
    """The `tokenizer.*` metadata of a file."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.path = file.path
        self.tokens: list[str] = self.list_of("ggml.tokens", str) if self.get("ggml.tokens") else []
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if not self.tokens or len(self.ids) != len(self.tokens):
            state = "no tokens" if not self.tokens else "the same token twice"
            raise ValueError(f"{file.path}: 'tokenizer.ggml.tokens' has {state}. {REMEDY}")

    def get(self, key: str) -> Any:
        """The value at `key`, None where there is none."""
        return self._file.metadata.get(f"tokenizer.{key}")

    def optional(self, key: str, kind: type, default: Any) -> Any:
        """The value of that type at `key`, or the default; ValueError where it has another type."""
        value = self.get(key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(
                f"{self.path}: 'tokenizer.{key}' is {short_repr(value)}; it must be a {kind.__name__}. {REMEDY}"
            )
        return default if value is None else value

    def list_of(self, key: str, kind: type) -> list[Any]:
        """The array of that type at `key`; ValueError where there is none."""
        values = self.get(key)
        if values is None:
            raise ValueError(f"{self.path} has no 'tokenizer.{key}'. {REMEDY}")
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise ValueError(
                f"{self.path}: 'tokenizer.{key}' is {short_repr(values)}; it must be an array of {kind.__name__}. "
                f"{REMEDY}"
            )
        return values

    def per_token(self, key: str, kind: type) -> list[Any]:
        """The array of that type at `key`, with one entry for each token; ValueError otherwise."""
        values = self.list_of(key, kind)
        if len(values) != len(self.tokens):
            found = f"{len(values)} entries for {len(self.tokens)} tokens"
            raise ValueError(f"{self.path}: 'tokenizer.{key}' has {found}")
        return values

    def of_type(self, kind: TokenType) -> list[str]:
        """The tokens of that type."""
        types = self.per_token("ggml.token_type", int)
        return [token for token, its_type in zip(self.tokens, types, strict=True) if its_type == kind]

    def token(self, role: str) -> str | None:
        """The token with that role, such as "bos"; None where the file names none."""
        index = self._file.integer(f"tokenizer.ggml.{role}_token_id")
        if index is None:
            return None
        if not 0 <= index < len(self.tokens):
            raise ValueError(f"{self.path}: 'tokenizer.ggml.{role}_token_id' is {index}, of {len(self.tokens)} tokens")
        return self.tokens[index]

    def pre_tokenizer(self) -> PreTokenizer:
        """The pre-tokenizer that the file names; ValueError where it is not supported."""
        name = self.optional("ggml.pre", str, "default")
        if name not in PRE_TOKENIZERS:
            raise ValueError(
                f"{self.path} has the pre-tokeniser {short_repr(name)}; supported: {', '.join(PRE_TOKENIZERS)}. "
                f"{REMEDY}"
            )
        return PRE_TOKENIZERS[name]
