"""The requests of a benchmark: random prompts, those of a dataset file, and their arrival times."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEED = 420
"""The seed that TensorRT-LLM's prepare-dataset uses."""

Prompt = str | list[int]
"""A text or token ids."""


@dataclass(frozen=True)
class BenchRequest:
    """One request: its prompt's token ids, and the number of tokens to generate."""

    prompt: list[int]
    output_tokens: int

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + self.output_tokens


def random_prompts(rng: np.random.Generator, count: int, length: int, vocab: int) -> list[list[int]]:
    """Prompts of uniform ids in [0, vocab)."""
    prompts: list[list[int]] = rng.integers(0, vocab, (count, length)).tolist()
    return prompts


def synthetic_requests(
    count: int, input_len: int, output_len: int, *, vocab: int, seed: int = SEED, prefix: int = 0
) -> list[BenchRequest]:
    """Requests of equal sizes with random prompts that share their first `prefix` ids."""
    rng = np.random.default_rng(seed)
    (shared,) = random_prompts(rng, 1, prefix, vocab)
    tails = random_prompts(rng, count, input_len - prefix, vocab)
    return [BenchRequest(shared + tail, output_len) for tail in tails]


def arrival_times(count: int, rate: float | None, *, seed: int = SEED) -> list[float]:
    """Arrival times in seconds after the first: a Poisson process of `rate` requests/s, or all at once for None."""
    if rate is None:
        return [0.0] * count
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    times: list[float] = (np.cumsum(gaps) - gaps[0]).tolist()
    return times


def read_dataset(
    path: Path, *, vocab: int, encode: Callable[[str], Sequence[int]], limit: int | None = None
) -> list[BenchRequest]:
    """The first `limit` prompts of `read_prompts` as requests, with texts encoded by `encode`."""
    return [
        BenchRequest(list(encode(prompt)) if isinstance(prompt, str) else prompt, tokens)
        for prompt, tokens in read_prompts(path, vocab=vocab, limit=limit)
    ]


def read_prompts(path: Path, *, vocab: int | None = None, limit: int | None = None) -> list[tuple[Prompt, int]]:
    """The first `limit` prompts of JSON lines as TensorRT-LLM's prepare-dataset writes them, and their output tokens.

    A line has "output_tokens" and either "prompt", a text, or "input_ids" (formerly "logits"), ids below `vocab` if it
    is given. ValueError names the line, the field, its value and the remedy.
    """
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"dataset = {path} cannot be read: {error}; give a file of JSON lines") from error
    prompts: list[tuple[Prompt, int]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and len(prompts) != limit:
            prompts.append(_entry(line, f"dataset {path}, line {number}", vocab))
    if not prompts:
        raise ValueError(f"dataset = {path} has no requests; give a file with one line of JSON for each request")
    return prompts


def _entry(line: str, where: str, vocab: int | None) -> tuple[Prompt, int]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); write one object on each line") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {line.strip()[:40]!r} is not an object; write one object on each line")
    tokens: Any = entry.get("output_tokens")
    if not _is_int(tokens) or tokens < 1:
        raise ValueError(
            f"{where}: output_tokens = {tokens!r} is not a positive integer; give the number of tokens to generate"
        )
    return _prompt(entry, where, vocab), tokens


def _prompt(entry: dict[str, Any], where: str, vocab: int | None) -> Prompt:
    text, ids = entry.get("prompt"), entry.get("input_ids", entry.get("logits"))
    if ids is None:
        if not isinstance(text, str) or not text:
            raise ValueError(f'{where}: prompt = {text!r} is not a text; give "prompt" (a text) or "input_ids" (ids)')
        return text
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"{where}: input_ids = {str(ids)[:40]} is not a list of token ids; give at least one")
    for wrong in _invalid_ids(ids, vocab):
        allowed = "positive integers or 0" if vocab is None else f"0 to {vocab - 1}"
        raise ValueError(f"{where}: input_ids has {wrong!r}; ids of this model are {allowed}")
    return ids


def _invalid_ids(ids: list[Any], vocab: int | None) -> Iterator[Any]:
    return (token for token in ids if not _is_int(token) or token < 0 or (vocab is not None and token >= vocab))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
