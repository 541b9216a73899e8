"""An `LLM` as an lm-eval model: likelihoods in padded batches over the engine's weights, answers from the engine."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trtllm_jax.functional.model import Model
from trtllm_jax.llmapi.llm import LLM
from trtllm_jax.logger import progress
from trtllm_jax.requests.sampling_params import SamplingParams
from trtllm_jax.text.inputs import check_ids

MAX_NEW_TOKENS = 256
"""lm-eval's default for tasks that set no length of answers."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""The generation arguments of tasks that `SamplingParams` has; others, of other backends, are ignored."""

Request = tuple[Any, list[int], list[int]]
"""lm-eval's key of the request (unused here), the context's ids, the continuation's ids."""


class EngineLM(TemplateLM):  # type: ignore[misc]
    """An `LLM` as an lm-eval model.

    Log-likelihoods come from `model`'s dense forward pass over `llm.params`, the engine's weights, in padded batches
    with the longest sequences first; logits are computed only for the continuations. Requests whose sequences differ
    only in the last token, such as single-letter choices, share a row. Answers come from `llm.generate`. Token ids and
    windows are those of lm-eval's transformers backend; like it, sequences that are too long lose their beginning.

    Args:
        llm: an LLM with a tokenizer.
        model: the same model, from `open_model`.
        max_length: the most tokens of a sequence, at most `llm`'s max_seq_len.
        tokens_at_once: the most tokens of a batch, with padding; None for a default by device.
    """

    def __init__(self, llm: LLM, model: Model, max_length: int, *, tokens_at_once: int | None = None) -> None:
        super().__init__()
        if llm.tokenizer is None:
            raise ValueError("an evaluation needs a tokenizer; load the LLM without skip_tokenizer_init=True")
        self.max_length = max_length
        self.tokenizer = llm.tokenizer.hf
        self._encode = llm.tokenizer.encode
        self._piece = llm.tokenizer.piece
        self._vocab = llm.facts.vocab
        self._llm = llm
        self._score = jax.jit(model.score)
        self._tokens_at_once = tokens_at_once or (1024 if model.platform.on_cpu else 8192)
        self._bos = llm.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a sequence."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The id that precedes a text without context: BOS, or EOS if there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, with the tokenizer's special tokens unless the text already begins with BOS."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._bos)
        return self._encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; ValueError if the model's template raises."""
        prompt = self._llm.chat_prompt(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(prompt["prompt"])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of each (context, continuation), and whether greedy decoding would generate it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in consecutive windows of `max_length` tokens."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = np.zeros(len(requests))
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return list(map(float, totals))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            self._check(context, continuation)
            # Without the last token, which is a target but never an input.
            ids = (context + continuation)[-self.max_length - 1 : -1]
            rows.setdefault(tuple(ids), []).append(index)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with progress(len(requests), "Scored requests", unit="request") as bar:
            for batch in batches(rows, self._tokens_at_once, self.max_length):
                owners = [index for ids in batch.rows for index in rows[ids]]
                for index, score in zip(owners, self._score_batch(batch, rows, requests), strict=True):
                    found[index] = score
                bar.update(len(owners))
        return found

    def _score_batch(
        self, batch: "Batch", rows: Mapping[tuple[int, ...], Sequence[int]], requests: Sequence[Request]
    ) -> Iterable[tuple[float, bool]]:
        tokens = np.zeros((batch.height, batch.width), np.int32)
        lengths = np.ones(batch.height, np.int32)
        places: list[int] = []
        targets: list[int] = []
        ends: list[int] = []
        for row, ids in enumerate(batch.rows):
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
            for index in rows[ids]:
                continuation = requests[index][2]
                end = row * batch.width + len(ids)
                places += range(end - len(continuation), end)
                targets += continuation
                ends.append(len(targets))
        size = _bucket(len(targets), 4)
        padded = np.zeros((2, size), np.int32)
        padded[:, : len(targets)] = places, targets
        scores = self._score(self._llm.params, tokens, padded[0], padded[1], lengths)
        logprobs, likeliest = np.asarray(scores.logprobs, np.float64), np.asarray(scores.likeliest)
        for start, end in zip([0, *ends], ends, strict=False):
            yield float(logprobs[start:end].sum()), bool(likeliest[start:end].all())

    def _check(self, context: Sequence[int], continuation: Sequence[int]) -> None:
        if not continuation:
            raise ValueError("a continuation is empty; check the task's choices and answers")
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens and max_seq_len is {self.max_length}: raise max_seq_len"
            )
        for name, ids in (("a context", context), ("a continuation", continuation)):
            check_ids(name, ids, self._vocab, self._llm.tokenizer)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each (context, arguments), up to the first of its stop strings."""
        prompts: list[list[int]] = []
        params: list[SamplingParams] = []
        stops: list[list[str]] = []
        for request in requests:
            context, arguments = request.args
            arguments = normalize_gen_kwargs(arguments, MAX_NEW_TOKENS)
            count = arguments["max_gen_toks"]
            if count >= self.max_length:
                raise ValueError(
                    f"max_gen_toks = {count} leaves no room for a prompt: max_seq_len is {self.max_length}; raise it"
                )
            prompts.append(self.tok_encode(context)[count - self.max_length :])
            stops.append([stop for stop in arguments["until"] if stop])
            params.append(self._sampling(arguments, stops[-1], count))
        outputs = self._llm.generate(prompts, params, use_tqdm=not disable_tqdm) if prompts else []
        return [_cut_at(output.outputs[0].text, ends) for output, ends in zip(outputs, stops, strict=True)]

    def _sampling(self, arguments: Mapping[str, Any], stops: Sequence[str], count: int) -> SamplingParams:
        sampled = arguments["do_sample"]
        given = {name: arguments[name] for name in SAMPLING if sampled and arguments.get(name) is not None}
        # Special tokens are not part of the text, so a stop string that is one has to be a stop token id.
        ids = {stop: self._encode(stop, add_special_tokens=False) for stop in stops}
        special = {stop: found[0] for stop, found in ids.items() if len(found) == 1 and self._is_special(found[0])}
        texts = [stop for stop in stops if stop not in special]
        return SamplingParams(
            max_tokens=count, stop=texts or None, stop_token_ids=list(special.values()) or None, **given
        )

    def _is_special(self, token: int) -> bool:
        """Whether `token` is a special token in the model's vocabulary."""
        return self._piece(token).special and token < self._vocab


class Batch(NamedTuple):
    """Rows of token ids that are computed together, and the shape [height, width] that they are padded to."""

    rows: list[tuple[int, ...]]
    height: int
    width: int


def batches(rows: Iterable[tuple[int, ...]], tokens: int, longest: int) -> Iterable[Batch]:
    """Batches of the rows, longest first, of at most `tokens` tokens or one row, in few shapes: each is compiled."""
    ordered = sorted(rows, key=len, reverse=True)
    while ordered:
        width = min(_bucket(len(ordered[0]), 2), max(longest, len(ordered[0])))
        most = max(1, tokens // width)
        now, ordered = ordered[:most], ordered[most:]
        yield Batch(now, min(most, _bucket(len(now), 2, least=1)), width)


def _bucket(count: int, factor: int, least: int = 32) -> int:
    size = least
    while size < count:
        size *= factor
    return size


def _cut_at(text: str, ends: Iterable[str]) -> str:
    for end in ends:
        text = text.split(end)[0]
    return text
