"""A request's fields as `SamplingParams`."""

from typing import Any

import numpy as np

from trtllm_jax.requests.sampling_params import SamplingParams
from trtllm_jax.serve.http.errors import bad
from trtllm_jax.serve.protocol.base import GenerationRequest, ResponseFormat
from trtllm_jax.structured.params import GuidedDecodingParams

_SAME_NAME = (
    "best_of", "detokenize", "early_stopping", "frequency_penalty", "ignore_eos", "include_stop_str_in_output",
    "length_penalty", "min_p", "min_tokens", "n", "no_repeat_ngram_size", "presence_penalty", "prompt_ignore_length",
    "repetition_penalty", "skip_special_tokens", "spaces_between_special_tokens", "stop_token_ids", "top_k",
    "top_p_min", "truncate_prompt_tokens", "use_beam_search",
)  # fmt: skip


def sampling_params(body: GenerationRequest, vocab: int, **special: Any) -> SamplingParams:
    """What the engine is asked for. Over HTTP temperature and top_p are 1.0 where they are not given.

    Args:
        body: the request.
        vocab: ids of the model are 0 to vocab - 1.
        special: parameters that the endpoints spell differently; None leaves one out.

    Raises:
        ValueError: a parameter is wrong, or two of them contradict each other.
    """
    same = {name: getattr(body, name) for name in _SAME_NAME}
    given = {
        **same,
        "early_stopping": body.early_stopping or None,
        "embedding_bias": _bias(body.logit_bias, vocab),
        "seed": None if body.seed is None else body.seed % (1 << 64),
        "stop": body.stops or None,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        **special,
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def guidance(wanted: ResponseFormat | None, grammar: str | None = None) -> GuidedDecodingParams | None:
    """`GuidedDecodingParams` for what the text must be, None for any text. ApiError where its content is missing.

    Where there is a `grammar` of the whole answer, it is what counts.
    """
    rule = rule_of(wanted) if grammar is None else {"grammar": grammar}
    if rule is None:
        return None
    return GuidedDecodingParams(**rule)


def rule_of(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The arguments of `GuidedDecodingParams`, None for any text. ApiError where content is missing."""
    if wanted is None or wanted.type == "text":
        return None
    match wanted.type:
        case "json_object":
            return {"json_object": True}
        case "json":
            return {"json": _present("response_format.schema", wanted.schema_)}
        case "json_schema":
            wrapped = _present("response_format.json_schema", wanted.json_schema)
            return {"json": _present("response_format.json_schema.schema", wrapped.schema_)}
        case "regex":
            return {"regex": _present("response_format.regex", wanted.regex)}
        case "ebnf":
            return {"grammar": _present("response_format.ebnf", wanted.ebnf)}


def _present(param: str, value: Any) -> Any:
    if value is None:
        raise bad(param, f"{param} is missing, which this type of response_format needs")
    return value


def _bias(given: dict[str, float] | None, vocab: int) -> Any:
    """float32 [vocab], None for no bias."""
    if not given:
        return None
    bias = np.zeros(vocab, np.float32)
    for token, value in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab):
            raise bad("logit_bias", f"logit_bias holds {token[:40]!r}: ids of this model are 0 to {vocab - 1}")
        bias[int(token)] = value
    return bias
