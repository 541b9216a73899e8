"""The tokenizer of a model, and the ids that end its sequences. Imports no jax."""

from pathlib import Path
from typing import Any

from checkpoints.checkpoint import Checkpoint
from checkpoints.error_text import short_repr
from trtllm_jax.common.numbers import INT32_MAX
from trtllm_jax.text.tokenizer import Tokenizer


def load_tokenizer(
    checkpoint: Checkpoint, given: Any = None, mode: str = "auto", revision: str | None = None
) -> Tokenizer:
    """The tokenizer that is `given`, as an object or by the name of its folder; the checkpoint's if none is given.

    `mode` and `revision` are those of `Checkpoint.load_tokenizer`.
    """
    if isinstance(given, Tokenizer):
        return given
    named = given is None or isinstance(given, str | Path)
    return Tokenizer(checkpoint.load_tokenizer(given, mode, revision) if named else given)


def stated_end_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """The ids that end a sequence according to the generation config, or to the model's if that states none.

    The end-of-turn tokens of a GGUF file are included.
    """
    config = checkpoint.generation_config
    stated = (config if "eos_token_id" in config else checkpoint.config).get("eos_token_id")
    ids = stated if isinstance(stated, list) else [stated] if stated is not None else []
    if not all(type(i) is int and 0 <= i <= INT32_MAX for i in ids):
        raise ValueError(
            f"{checkpoint.path} has eos_token_id={short_repr(stated)}; it must be a token id or a list of them: "
            "correct generation_config.json or config.json"
        )
    return frozenset(ids) | checkpoint.turn_ends
