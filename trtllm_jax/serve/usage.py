"""Counting tokens for `usage`."""

from collections.abc import Sequence
from typing import Any

from trtllm_jax.requests.outputs import RequestOutput


def usage(outputs: Sequence[RequestOutput], shown: bool = True) -> dict[str, Any]:
    """OpenAI's record of what was read and written so far; `shown`: whether what was generated is given away."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    written = sum(answer.length for output in outputs for answer in output.outputs) if shown else 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in outputs)},
    }
