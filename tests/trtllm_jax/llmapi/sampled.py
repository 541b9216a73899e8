"""Requests whose logits are changed or reported, and what transformers' logits say of their answers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from trtllm_jax import LLM, SamplingParams

EOS, SPECIAL, VOCAB = 256, 257, 258
Logits = np.ndarray[Any, np.dtype[np.float32]]
LogitsAfter = Callable[[list[int]], Logits]


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def free(**arguments: Any) -> SamplingParams:
    """Parameters of a sequence that only its length ends."""
    return SamplingParams(**{"max_tokens": 20, "ignore_eos": True, **arguments})


def tokens_of(llm: LLM, prompt: Any, **arguments: Any) -> list[int]:
    return llm.generate(prompt, free(**arguments)).outputs[0].token_ids


def greedily(
    logits_after: LogitsAfter, prompt: list[int], change: Callable[[Logits, list[int]], None], count: int = 20
) -> list[int]:
    """The likeliest ids, one by one, of logits that `change` had before."""
    tokens = list(prompt)
    for _ in range(count):
        logits = logits_after(tokens)[-1]
        change(logits, tokens)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def check_prompt_logprobs(
    entries: Sequence[dict[int, Any]], prompt: list[int], first: int, logits: Logits, count: int
) -> None:
    """As in TensorRT-LLM: entry i is of the logits after token i, and has token i + 1, or the first that was drawn."""
    scores = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert len(entries) == len(prompt)
    for entry, row, follows in zip(entries, scores, [*prompt[1:], first], strict=True):
        order = np.argsort(-row)
        assert list(entry)[:count] == order[:count].tolist()
        assert list(entry)[count:] in ([], [follows])
        assert entry[follows].rank == 1 + order.tolist().index(follows)
        for token, value in entry.items():
            assert value.logprob == pytest.approx(row[token], abs=1e-4)


def unchanged(req_id: int, logits: Logits, token_ids: Any, stream_ptr: Any, client_id: Any) -> None:
    """StepEdits nothing, but has the host draw."""
