"""From prompts and sampling parameters to sequences for an engine; all are validated here, before any sequence runs."""

import itertools
import secrets
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from trtllm_jax.common.errors import RequestError
from trtllm_jax.engine.logit_edits import LogitEdits
from trtllm_jax.engine.request import MAX_LOGPROBS, FinishReason, Request
from trtllm_jax.requests.output_processor import OutputProcessor, PromptLogprobs
from trtllm_jax.requests.outputs import RequestOutput
from trtllm_jax.requests.sampling_params import SamplingParams
from trtllm_jax.structured.matcher import GrammarCompiler, LLGuidanceMatcher
from trtllm_jax.text.detokenizer import IncrementalDetokenizer, anchor_of
from trtllm_jax.text.inputs import Encoding, Prompt, check_ids, read_prompt
from trtllm_jax.text.tokenizer import Tokenizer

Task = Literal["generate", "embed", "classify"]
"""What an engine does with a prompt: continue it, or compute it whole for an embedding or for logits of classes."""


@dataclass(frozen=True)
class EngineFacts:
    """The engine's limits, which requests are checked against, and its defaults for what requests leave out.

    Attributes:
        vocab: the model's vocabulary size; ids are 0 to vocab - 1.
        end_ids: ids that end a sequence.
        max_batch_size: most sequences that run at once.
        max_seq_len: most tokens of prompt and answer together.
        max_input_len: most tokens of a prompt; None if only `max_seq_len` bounds it.
        stream_interval: steps between two updates of a stream.
        batched_processor: whether the engine has a `BatchedLogitsProcessor`.
        model_type: config.json's "model_type"; "" if it has none.
        task: what it does with prompts; one that generates embeds them too.
        class_names: the names of a classifier's classes, in the order of its logits; () for other models.
        class_activation: a key of `ACTIVATIONS`, what makes probabilities of a classifier's logits.
        score_activation: a key of `ACTIVATIONS`, what makes the logit of a pair of texts its score.
    """

    vocab: int
    end_ids: frozenset[int]
    max_batch_size: int
    max_seq_len: int
    max_input_len: int | None
    stream_interval: int
    batched_processor: bool
    model_type: str
    task: Task = "generate"
    class_names: tuple[str, ...] = ()
    class_activation: str = "identity"
    score_activation: str = "identity"

    @property
    def generates(self) -> bool:
        """Whether the model generates tokens; one that does not computes texts whole."""
        return self.task == "generate"

    def require_generation(self) -> None:
        """ValueError, which says what to use instead, if the model generates no tokens."""
        if not self.generates:
            method = "LLM.embed" if self.task == "embed" else "LLM.encode"
            raise ValueError(f"this model computes texts whole and generates none: use {method}")


class _Rules(NamedTuple):
    """What the sequences of one prompt share: stop ids, logit edits, and a grammar matcher in its initial state."""

    stop_ids: frozenset[int]
    edits: LogitEdits | None
    matcher: LLGuidanceMatcher | None


class RequestBuilder:
    """Makes the result and the sequences of each prompt; thread-safe.

    Args:
        facts: the engine's limits and defaults.
        tokenizer: None if prompts are token ids and answers have no text.
        finish: ends a running sequence early. Results refer to the engine by this and `before_waiting` only.
        before_waiting: called before a thread or task waits for a result; raises if that would deadlock.
    """

    def __init__(
        self,
        facts: EngineFacts,
        tokenizer: Tokenizer | None,
        finish: Callable[[Request, FinishReason], None],
        before_waiting: Callable[[], None],
    ) -> None:
        self.facts = facts
        self._tokenizer = tokenizer
        self._finish = finish
        self._before_waiting = before_waiting
        guided = tokenizer if facts.generates else None
        self._grammars = GrammarCompiler(guided, facts.vocab, facts.end_ids) if guided else None
        self._request_ids = itertools.count(1)
        self._lock = threading.Lock()

    def requests(
        self, inputs: Sequence[Any], params: Sequence[SamplingParams], streaming: bool, *, embed: bool = False
    ) -> list[tuple[RequestOutput, list[Request]]]:
        """For each prompt, its result and the sequences that fill it; with `embed` they yield only a vector.

        ValueError or TypeError if a prompt or a parameter is invalid, or if the model does not do that.
        """
        whole = not self.facts.generates
        if not embed:
            self.facts.require_generation()
        # Copies, because the caller may change a record while the sequences run.
        params = [self._checked(each) for each in params]
        for each in params:
            if streaming and each.sequences > each.n:
                raise ValueError(
                    f"SamplingParams.best_of = {each.best_of} is invalid with streaming: the best n = {each.n} "
                    "sequences are known only at the end; leave out best_of or streaming"
                )
        prompts = [
            read_prompt(
                one,
                Encoding(
                    self._tokenizer, self.facts.vocab, each.add_special_tokens, each.truncate_prompt_tokens, whole
                ),
            )
            for one, each in zip(inputs, params, strict=True)
        ]
        interval = self.facts.stream_interval if streaming else None
        # Outside the lock, because compiling a grammar may take a while and would block other threads.
        rules = self._rules(params)
        # Checked last, because any other error, such as a text prompt without a tokenizer, is more specific.
        if self._tokenizer is None and any(each.end_id is None and not each.ignore_eos for each in params):
            raise ValueError("tokenizer is required to reset end_id: with skip_tokenizer_init=True give end_id")
        with self._lock:
            return [
                self._request(prompt, each, rule, interval, embed)
                for prompt, each, rule in zip(prompts, params, rules, strict=True)
            ]

    def matcher(self, edits: LogitEdits | None) -> LLGuidanceMatcher | None:
        """A new grammar matcher for the constraint of `edits`; None without one. RequestError if it is invalid."""
        if edits is None or edits.constraint is None:
            return None
        if self._grammars is None:
            raise RequestError("SamplingParams.guided_decoding needs a tokenizer; leave skip_tokenizer_init=True out")
        return self._grammars.start(edits.constraint)

    def _rules(self, params: Sequence[SamplingParams]) -> list[_Rules]:
        """The rules of each prompt. Each has its own matcher, because copies of one contend for its lexer's lock."""
        rules = []
        for each in params:
            stops = set(each.stop_token_ids or ())
            if not each.ignore_eos:
                stops |= self.facts.end_ids if each.end_id is None else {each.end_id}
            if each.guided_decoding is not None:
                stops |= self.facts.end_ids  # the only tokens that the grammar allows after a complete text
            edits = each.edits(frozenset(stops), self._bad_ids(each))
            rules.append(_Rules(frozenset(stops), edits, self.matcher(edits)))
        return rules

    def _checked(self, params: Any) -> SamplingParams:
        """A copy of `params`, checked against this engine. TypeError or ValueError if they are invalid."""
        if not isinstance(params, SamplingParams):
            raise TypeError(
                "sampling_params must be a SamplingParams or a list with one for each prompt; got "
                f"{type(params).__name__}"
            )
        if params.logprobs is not None and params.logprobs > MAX_LOGPROBS:
            raise ValueError(f"SamplingParams.logprobs = {params.logprobs} is invalid: use at most {MAX_LOGPROBS}")
        if params.stop_strings and self._tokenizer is None:
            raise ValueError("SamplingParams.stop needs a tokenizer; use stop_token_ids with skip_tokenizer_init=True")
        self._check_ids(params)
        if params.bad_words and self._tokenizer is None:
            raise ValueError("SamplingParams.bad needs a tokenizer; use bad_token_ids with skip_tokenizer_init=True")
        if params.apply_batched_logits_processor and not self.facts.batched_processor:
            raise ValueError(
                "SamplingParams.apply_batched_logits_processor = True needs a processor: set "
                "LLM(batched_logits_processor=...)"
            )
        return params.model_copy()

    def _check_ids(self, params: SamplingParams) -> None:
        """ValueError if a token id or the length of `embedding_bias` does not fit the model's vocabulary."""
        named = {
            "bad_token_ids": params.bad_token_ids,
            "stop_token_ids": params.stop_token_ids,
            "top_p_reset_ids": None if params.top_p_reset_ids is None else [params.top_p_reset_ids],
            "end_id": None if params.end_id is None or params.end_id < 0 else [params.end_id],
        }
        for field, ids in named.items():
            check_ids(f"SamplingParams.{field}", ids or (), self.facts.vocab, self._tokenizer)
        if params.embedding_bias is not None and len(params.embedding_bias) != self.facts.vocab:
            raise ValueError(
                f"SamplingParams.embedding_bias has {len(params.embedding_bias)} entries; this model's vocabulary has "
                f"{self.facts.vocab}"
            )

    def _bad_ids(self, params: SamplingParams) -> list[tuple[int, ...]]:
        """The token ids of each bad word, encoded with and without a space before it."""
        if self._tokenizer is None:
            return []
        spellings = [spelling for word in params.bad_words for spelling in (word, f" {word}")]
        encoded = [tuple(self._tokenizer.encode(spelling, add_special_tokens=False)) for spelling in spellings]
        for spelling, ids in zip(spellings, encoded, strict=True):
            check_ids(f"SamplingParams.bad = {spelling!r}", ids, self.facts.vocab, self._tokenizer)
        return list(dict.fromkeys(ids for ids in encoded if ids))

    def _request(
        self, prompt: Prompt, params: SamplingParams, rules: _Rules, interval: int | None, embed: bool
    ) -> tuple[RequestOutput, list[Request]]:
        """A result and the sequences that fill it."""
        max_tokens = self._clamped_max_tokens(prompt, params)
        sampling = params.resolved()
        # From the system's entropy, so that two processes, or a process and its fork, do not draw the same samples.
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(64)
        best_of_more = params.sequences > params.n
        requests: list[Request] = []
        running: weakref.WeakSet[Request] = weakref.WeakSet()
        # A local, so that the result refers to the engine but not to the LLM. The set above is weak because a sequence
        # refers to its result.
        end = self._finish

        def abort() -> None:
            for request in list(running):
                end(request, FinishReason.CANCELLED)

        output = RequestOutput(
            next(self._request_ids),
            prompt.text,
            list(prompt.ids),
            params.sequences,
            abort,
            before_waiting=self._before_waiting,
            keep=params.n,
        )
        if not params.exclude_input_from_output:
            output._prepend_prompt(prompt.ids, shown_prompt(prompt, params, self._tokenizer))
        prompt_logprobs = PromptLogprobs(prompt.ids, params.prompt_logprobs)
        ids = tuple(prompt.ids)
        for index in range(params.sequences):
            processor = OutputProcessor(
                output,
                index,
                params,
                self._detokenizer(prompt, params),
                interval,
                lambda request: end(request, FinishReason.STOP),
                prompt_logprobs,
            )
            requests.append(
                Request(
                    prompt=ids,
                    max_tokens=max_tokens,
                    sampling=replace(sampling, seed=(seed + index) % (1 << 64)),
                    stop_ids=rules.stop_ids,
                    # best_of ranks the sequences by their log-probabilities.
                    num_logprobs=0 if params.logprobs is None and best_of_more else params.logprobs,
                    edits=rules.edits,
                    matcher=rules.matcher.copy() if rules.matcher else None,
                    reports=_reports(params, embed, first=index == 0),
                    id=output.request_id,
                    salt=prompt.salt,
                    parent=requests[0] if requests else None,
                    owner=processor,
                    token_types=prompt.token_types,
                )
            )
        running.update(requests)
        return output, requests

    def _clamped_max_tokens(self, prompt: Prompt, params: SamplingParams) -> int:
        """`max_tokens`, or what `max_seq_len` leaves after the prompt. RequestError if the prompt is too long."""
        length, limit = len(prompt.ids), self.facts.max_seq_len
        whole = not self.facts.generates
        if self.facts.max_input_len is not None and length > self.facts.max_input_len:
            raise RequestError(
                f"the prompt has {length} tokens, max_input_len is {self.facts.max_input_len}; shorten the prompt, set "
                "truncate_prompt_tokens or raise max_input_len"
            )
        if whole and length > limit:
            raise RequestError(
                f"the text has {length} tokens and max_seq_len is {limit}; shorten it or set truncate_prompt_tokens"
            )
        if whole:
            return 0
        if length >= limit:
            raise RequestError(
                f"the prompt has {length} tokens and max_seq_len is {limit}, which leaves no room for an answer; "
                "shorten the prompt, set truncate_prompt_tokens, or raise max_seq_len where model and KV cache allow it"
            )
        return min(params.max_tokens, limit - length)

    def _detokenizer(self, prompt: Prompt, params: SamplingParams) -> IncrementalDetokenizer | None:
        if self._tokenizer is None or not params.detokenize:
            return None
        continues_prompt = not params.exclude_input_from_output
        return IncrementalDetokenizer(
            self._tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            after=anchor_of(self._tokenizer, prompt.ids, params.skip_special_tokens) if continues_prompt else None,
        )


def _reports(params: SamplingParams, embed: bool, first: bool) -> frozenset[str]:
    """Names of the `ROW_OUTPUTS` that a sample reports; the `first` sample computes the prompt for all of them."""
    requested = {
        "generation_logits": params.return_generation_logits,
        "context_logits": first and (params.return_context_logits or params.prompt_logprobs is not None),
        "embedding": embed,
    }
    return frozenset(name for name, is_requested in requested.items() if is_requested)


def shown_prompt(prompt: Prompt, params: SamplingParams, tokenizer: Tokenizer | None) -> str:
    """The text of the prompt's ids, after truncation; "" if the request does not detokenise."""
    if tokenizer is None or not params.detokenize:
        return ""
    if prompt.text is not None and params.truncate_prompt_tokens is None:
        return prompt.text
    return tokenizer.decode(prompt.ids, params.skip_special_tokens)
