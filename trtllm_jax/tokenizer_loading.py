"""The tokenizer that a model's arguments name, and the ids that end its sequences. Knows no jax."""

from pathlib import Path

from checkpoints.checkpoint import Checkpoint
from checkpoints.shown import shown
from trtllm_jax.llm_args import LlmArgs
from trtllm_jax.models.config import INT32_MAX
from trtllm_jax.tokenizer import Tokenizer


def load_tokenizer(args: LlmArgs, checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer of `args`, the checkpoint's where they name none; None if they want none."""
    if args.skip_tokenizer_init:
        return None
    if args.tokenizer is None or isinstance(args.tokenizer, str | Path):
        hf = checkpoint.load_tokenizer(args.tokenizer, args.tokenizer_mode, args.tokenizer_revision)
    else:
        hf = args.tokenizer
    return hf if isinstance(hf, Tokenizer) else Tokenizer(hf)


def stated_end_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """The ids that end a sequence according to the generation config, or the model's where that says nothing.

    Those that end a turn by their names are among them.
    """
    stated = checkpoint.generation_config.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    ids = stated if isinstance(stated, list) else [stated] if stated is not None else []
    if not all(type(i) is int and 0 <= i <= INT32_MAX for i in ids):
        raise ValueError(
            f"{checkpoint.path} has eos_token_id={shown(stated)}; it must be a token id or a list of them: correct "
            "generation_config.json or config.json"
        )
    return frozenset(ids) | checkpoint.turn_ends
