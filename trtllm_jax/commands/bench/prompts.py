"""Writes the lines of a dataset in TensorRT-LLM's form, from random ids or a file's texts; `workload` reads them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_jax.commands.bench.workload import SEED, Prompt, random_prompts
from trtllm_jax.logger import progress

Lengths = Callable[[np.random.Generator, int], list[int]]
"""A function that draws a number of lengths."""

Turn = tuple[str, str]
"""A user's message and its answer."""

_USER = ("human", "user")
_ASSISTANT = ("gpt", "assistant", "chatgpt", "bot")


def normal(mean: int, deviation: int) -> Lengths:
    """Draws rounded values of a normal distribution; those below 1 become 1."""

    def draw(rng: np.random.Generator, count: int) -> list[int]:
        lengths: list[int] = np.maximum(1, np.rint(rng.normal(mean, deviation, count))).astype(int).tolist()
        return lengths

    return draw


def uniform(least: int, most: int) -> Lengths:
    """Draws integers uniformly between two bounds, both included."""

    def draw(rng: np.random.Generator, count: int) -> list[int]:
        lengths: list[int] = rng.integers(least, most, count, endpoint=True).tolist()
        return lengths

    return draw


def random_lines(
    count: int,
    inputs: Lengths,
    outputs: Lengths,
    *,
    vocab: int,
    seed: int = SEED,
    require_length: Callable[[int], object] = lambda length: None,
) -> list[str]:
    """Prompts of uniform ids in [0, vocab). `require_length` raises ValueError where the model is too short for one."""
    rng = np.random.default_rng(seed)
    lengths = list(zip(inputs(rng, count), outputs(rng, count), strict=True))
    require_length(max(map(sum, lengths)))
    return [line(number, random_prompts(rng, 1, given, vocab)[0], new) for number, (given, new) in enumerate(lengths)]


def line(number: int, prompt: Prompt, output_tokens: int) -> str:
    """One request as a line of JSON."""
    field = "prompt" if isinstance(prompt, str) else "input_ids"
    return json.dumps({"task_id": number, field: prompt, "output_tokens": output_tokens})


@dataclass(frozen=True)
class Fields:
    """The fields of a file's entries to use.

    Attributes:
        input: the prompt's; None for the first turn of the entry's conversation, or "prompt" without one.
        output: the answer's; None for the first turn's answer.
        before: of a text to put before the prompt; None for `before_text`.
        before_text: a text to put before every prompt; None for none.
    """

    input: str | None = None
    output: str | None = None
    before: str | None = None
    before_text: str | None = None

    def turn(self, entry: Mapping[str, Any]) -> Turn:
        """Prompt and answer of an entry, empty where it has none."""
        question, answered = _first_turn(entry)
        if self.input or not question:
            question = _text(entry.get(self.input or "prompt"))
        if self.output:
            answered = _text(entry.get(self.output))
        before = _text(entry.get(self.before)) if self.before else self.before_text
        return (f"{before} {question}" if before and question else question), answered


def real_lines(
    path: Path,
    fields: Fields,
    *,
    encode: Callable[[str], Sequence[int]],
    output_len_dist: tuple[int, int] | None = None,
    num_requests: int | None = None,
    max_input_len: int | None = None,
    seed: int = SEED,
) -> list[str]:
    """The prompts of a file, each with its answer's length or one drawn from a normal distribution.

    ValueError if the file cannot be read, or no entry has the fields that are needed.
    """
    rng, lines = np.random.default_rng(seed), list[str]()
    entries = read_entries(path)
    with progress(len(entries), "Counting tokens") as bar:
        for entry in entries:
            bar.update()
            question, answered = fields.turn(entry)
            if not question or (max_input_len and len(encode(question)) > max_input_len):
                continue
            tokens = normal(*output_len_dist)(rng, 1)[0] if output_len_dist else len(encode(answered))
            if answered or output_len_dist:
                lines.append(line(len(lines), question, tokens))
            if len(lines) == num_requests:
                break
    if not lines:
        raise ValueError(
            f"dataset_name = {path}: none of its {len(entries)} entries has a prompt"
            + (f" of at most {max_input_len} tokens" if max_input_len else "")
            + ("" if output_len_dist else " and an answer")
            + "; name its fields by --dataset_input_key and --dataset_output_key, or give --output_len_dist"
        )
    return lines


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list or of JSON lines; ValueError names an entry that is not an object."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"dataset_name = {path} cannot be read: {error}; give JSON or JSON lines") from error
    entries = list(_parsed(text, path))
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise ValueError(f"dataset_name = {path}, entry {number}: {str(entry)[:40]!r} is not an object")
    return entries


def _parsed(text: str, path: Path) -> Iterator[Any]:
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if whole is not None:
        yield from whole if isinstance(whole, list) else [whole]
        return
    for number, one in enumerate(text.split("\n"), start=1):
        if one.strip():
            try:
                yield json.loads(one)
            except ValueError as error:
                raise ValueError(f"dataset_name = {path}, line {number}: not JSON ({error})") from error


def _first_turn(entry: Mapping[str, Any]) -> Turn:
    """The first turn of ShareGPT's "conversations" (from, value) or of OpenAI's "messages" (role, content)."""
    turns = entry.get("conversations", entry.get("messages"))
    messages = [one for one in turns if isinstance(one, dict)] if isinstance(turns, list) else []
    spoken = [(one.get("from", one.get("role")), _text(one.get("value", one.get("content")))) for one in messages]
    first = next((i for i, (role, _) in enumerate(spoken) if role in _USER), None)
    if first is None:
        return "", ""
    answer = spoken[first + 1] if first + 1 < len(spoken) else ("", "")
    return spoken[first][1], answer[1] if answer[0] in _ASSISTANT else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
