"""`SamplingParams`: how one request is sampled and when it ends, and the engine's form of these settings."""

import os
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from trtllm_jax.common.numbers import FLOAT32_MAX
from trtllm_jax.common.strict_model import NonNegativeInt, PositiveInt, StrictModel
from trtllm_jax.engine.logit_edits import LogitEdits
from trtllm_jax.engine.sampling import NucleusDecay, Sampling
from trtllm_jax.requests.logits_processors import as_processors
from trtllm_jax.structured.params import GuidedDecodingParams

_ALLOW_N_GREEDY = "TLLM_ALLOW_N_GREEDY_DECODING"
_NO_NGRAM = 1 << 30
_LEAST_TOP_P, _RESET_ID = 1e-6, 1
"""TensorRT-LLM's defaults of top_p_min and top_p_reset_ids, if only top_p_decay is given."""

NonEmptyStr = Annotated[str, Field(min_length=1)]
TokenIdOrNone = Annotated[int, Field(ge=-1)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=FLOAT32_MAX)]
AnyFloat = Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX)]
Samples = Annotated[int, Field(ge=1, le=16384)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
LogprobCount = Annotated[
    NonNegativeInt | None,
    BeforeValidator(lambda count: (1 if count else None) if isinstance(count, bool) else count),
]


class SamplingParams(StrictModel):
    """TensorRT-LLM's sampling parameters, with its names and defaults.

    Decoding is greedy if none of ``temperature``, ``top_k`` and ``top_p`` is given, if ``temperature`` or ``top_p`` is
    0, or if ``top_k`` is 1; otherwise they default to 1.0, 0 (all tokens) and 1.0. Lengths are in tokens.
    ``truncate_prompt_tokens`` keeps that many of a prompt's last tokens. ``end_id`` -1 means no end id. ``logprobs`` is
    the number of alternatives to report (True means 1). ``length_penalty`` concerns beam search, ``pad_id`` padded
    batches and ``spaces_between_special_tokens`` slow tokenizers; none of them has an effect here.
    """

    _unavailable: ClassVar = {
        "beam_width": (1,),
        "use_beam_search": (False,),
        "beam_search_diversity_rate": (None, 0.0),
        "early_stopping": (None,),
        "beam_width_array": (None,),
        "return_encoder_output": (False,),
        "return_perf_metrics": (False,),
        "additional_model_outputs": (None,),
        "lookahead_config": (None,),
        "thinking_token_budget": (None,),
    }

    end_id: TokenIdOrNone | None = None
    pad_id: TokenIdOrNone | None = None
    max_tokens: PositiveInt = 32
    bad: NonEmptyStr | list[NonEmptyStr] | None = None
    bad_token_ids: list[NonNegativeInt] | None = None
    stop: NonEmptyStr | list[NonEmptyStr] | tuple[NonEmptyStr, ...] | None = None
    stop_token_ids: list[NonNegativeInt] | tuple[NonNegativeInt, ...] | None = None
    include_stop_str_in_output: bool = False
    embedding_bias: Any = None
    logits_processor: Any = None
    apply_batched_logits_processor: bool = False
    n: Samples = 1
    best_of: Samples | None = None
    use_beam_search: bool = False
    beam_width: PositiveInt = 1
    top_k: NonNegativeInt | None = None
    top_p: Fraction | None = None
    top_p_min: PositiveFraction | None = None
    top_p_reset_ids: NonNegativeInt | None = None
    top_p_decay: PositiveFraction | None = None
    seed: Seed | None = None
    temperature: NonNegativeFloat | None = None
    min_tokens: NonNegativeInt | None = None
    beam_search_diversity_rate: NonNegativeFloat | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=FLOAT32_MAX)] | None = None
    presence_penalty: AnyFloat | None = None
    frequency_penalty: AnyFloat | None = None
    length_penalty: float | None = None
    early_stopping: int | None = None
    no_repeat_ngram_size: NonNegativeInt | None = None
    prompt_ignore_length: NonNegativeInt | None = None
    min_p: Fraction | None = None
    beam_width_array: list[PositiveInt] | None = None
    logprobs: LogprobCount = None
    prompt_logprobs: LogprobCount = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    return_encoder_output: bool = False
    return_perf_metrics: bool = False
    additional_model_outputs: list[str] | None = None
    lookahead_config: Any = None
    guided_decoding: GuidedDecodingParams | None = None
    thinking_token_budget: NonNegativeInt | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: PositiveInt | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    @property
    def greedy(self) -> bool:
        """Whether decoding always takes the likeliest token."""
        unset = self.temperature is None and self.top_k is None and self.top_p is None
        return unset or self.temperature == 0 or self.top_k == 1 or self.top_p == 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple; empty if it is None."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def bad_words(self) -> tuple[str, ...]:
        """``bad`` as a tuple; empty if it is None."""
        if self.bad is None:
            return ()
        return (self.bad,) if isinstance(self.bad, str) else tuple(self.bad)

    @property
    def sequences(self) -> int:
        """The number of sequences to generate, of which the best n are returned."""
        return self.best_of or self.n

    def edits(self, ends: frozenset[int], bad: Sequence[tuple[int, ...]]) -> LogitEdits | None:
        """The changes to a sequence's logits before a token is drawn; None if there are none.

        ``ends`` are the ids that end the sequence; ``bad`` the ids of each bad word, besides ``bad_token_ids``.
        """
        bad = (*bad, *((token,) for token in self.bad_token_ids or ()))
        penalties = (self.repetition_penalty or 1.0, self.presence_penalty or 0.0, self.frequency_penalty or 0.0)
        ngram = min(self.no_repeat_ngram_size or 0, _NO_NGRAM)
        processors = as_processors(self.logits_processor)
        requested = (
            bool(processors), self.apply_batched_logits_processor, self.embedding_bias is not None,
            penalties != (1.0, 0.0, 0.0), (self.min_tokens or 0) > 0, 0 < ngram < _NO_NGRAM, bool(bad),
            self.guided_decoding is not None,
        )  # fmt: skip
        if not any(requested):
            return None
        repetition, presence, frequency = penalties
        return LogitEdits(
            processors=processors,
            batched=self.apply_batched_logits_processor,
            bias=None if self.embedding_bias is None else np.array(self.embedding_bias, np.float32),
            repetition=repetition,
            presence=presence,
            frequency=frequency,
            ignored_prompt=self.prompt_ignore_length or 0,
            min_tokens=self.min_tokens or 0,
            ends=ends,
            no_repeat_ngram=0 if ngram == _NO_NGRAM else ngram,
            bad=bad,
            constraint=None if self.guided_decoding is None else self.guided_decoding.constraint(),
        )

    def resolved(self) -> Sampling:
        """The engine's sampling settings, with all defaults applied."""
        if self.greedy:
            return Sampling(temperature=1.0, top_k=1, top_p=1.0, min_p=0.0, seed=self.seed, greedy=True)
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            seed=self.seed,
            greedy=False,
            decay=self._decay(),
        )

    def _decay(self) -> NucleusDecay | None:
        if self.top_p_decay is None or self.top_p_decay == 1.0:
            return None
        reset_id = _RESET_ID if self.top_p_reset_ids is None else self.top_p_reset_ids
        return NucleusDecay(self.top_p_decay, self.top_p_min or _LEAST_TOP_P, reset_id)

    def copy(self) -> Self:  # type: ignore[override]
        """A deep copy."""
        return self.model_copy(deep=True)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(
                f"SamplingParams.best_of = {self.best_of} is invalid: it should be at least n = {self.n}, or left out"
            )
        if self.sequences > 1 and self.greedy and os.environ.get(_ALLOW_N_GREEDY) != "1":
            field, count = ("best_of", self.best_of) if (self.best_of or 1) > self.n else ("n", self.n)
            raise ValueError(
                f"SamplingParams.{field} = {count} is invalid: greedy decoding gives {count} equal answers; use "
                f"{field}=1, set temperature, top_k or top_p so that answers differ, or set the environment variable "
                f"{_ALLOW_N_GREEDY}=1"
            )
        if self.stop_strings and not self.detokenize:
            raise ValueError(
                f"SamplingParams.stop = {self.stop!r} is invalid with detokenize = False: stop strings are found in "
                "the text; use stop_token_ids or detokenize=True"
            )
        if (self.min_tokens or 0) > self.max_tokens:
            raise ValueError(
                f"SamplingParams.min_tokens = {self.min_tokens} is invalid: it should be at most max_tokens = "
                f"{self.max_tokens}"
            )
        if self.greedy and (self.top_p_decay or 1.0) != 1.0:
            raise ValueError(
                f"SamplingParams.top_p_decay = {self.top_p_decay} is invalid: greedy decoding does not use top_p; set "
                "temperature or top_p, or leave it out"
            )
        as_processors(self.logits_processor)
        self._check_bias()
        return self

    def _check_bias(self) -> None:
        if self.embedding_bias is None:
            return
        try:
            with np.errstate(over="ignore"):
                bias = np.asarray(self.embedding_bias, np.float32)
        except (TypeError, ValueError):
            bias = np.zeros((), np.float32)
        if bias.ndim != 1 or np.isnan(bias).any() or not np.isfinite(bias).any() or np.isposinf(bias).any():
            raise ValueError(
                f"SamplingParams.embedding_bias = {reprlib.repr(self.embedding_bias)} is invalid: give one number for "
                "each id of the vocabulary, finite or -inf, and at least one of them finite"
            )
