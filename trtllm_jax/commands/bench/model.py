"""`ModelFacts`: a model's vocabulary, context and tokenizer, read before the engine starts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_MAX_ROPE_FACTOR = 1e30  # a factor that the engine will refuse

Encode = Callable[[str], Sequence[int]]


class ModelFacts:
    """Properties of the model at `location` (a folder, a .gguf file or a hub name), read from its configuration.

    With `weights` False, the weights of a model on the hub are not downloaded.

    Attributes:
        vocab: the vocabulary size.
        max_position: tokens of the longest sequence, or an upper bound if rope is scaled; None if not configured.

    Raises:
        ValueError: there is no such model, or its configuration has no vocabulary size.
    """

    def __init__(self, location: str, *, weights: bool = True) -> None:
        from checkpoints.checkpoint import open_checkpoint
        from trtllm_jax.models import gguf_architectures

        self._checkpoint = open_checkpoint(location, weights=weights, gguf_architectures=gguf_architectures())
        config = self._checkpoint.config
        text = config | _object(config, "text_config")
        if not isinstance(text.get("vocab_size"), int):
            raise ValueError(f"model = {location}: its config.json has no vocab_size; add it")
        self.vocab: int = text["vocab_size"]
        positions = text.get("max_position_embeddings")
        self.max_position = int(positions * _rope_factor(text)) if isinstance(positions, int) else None

    def require_length(self, length: int) -> None:
        """ValueError if `length` tokens exceed the model's longest sequence."""
        if self.max_position is not None and length > self.max_position:
            raise ValueError(
                f"a request of this workload has {length} tokens, prompt and answer, and the model's longest sequence "
                f"has {self.max_position}: shorten the prompts or answers"
            )

    def encoder(self, tokenizer: str | None) -> Encode:
        """A function from text to ids, of `tokenizer` or of the model's own, which is loaded at the first call."""
        loaded: Any = None

        def encode(text: str) -> Sequence[int]:
            nonlocal loaded
            if loaded is None:
                loaded = self._checkpoint.load_tokenizer(tokenizer)
            ids: list[int] = loaded.encode(text)
            return ids

        return encode


def _rope_factor(config: Mapping[str, Any]) -> float:
    """An upper bound of the factor by which rope scaling extends sequences; the engine checks the exact length."""
    scaling = _object(config, "rope_scaling") or _object(config, "rope_parameters")
    factor = scaling.get("factor")
    return max(1.0, float(factor)) if isinstance(factor, int | float) and factor < _MAX_ROPE_FACTOR else 1.0


def _object(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The object at `field`, or {} if there is none; the engine reports an invalid value."""
    value = config.get(field)
    return value if isinstance(value, dict) else {}
