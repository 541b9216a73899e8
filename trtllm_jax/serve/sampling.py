"""A request's fields as `SamplingParams`."""

from typing import Any

import numpy as np

from trtllm_jax.requests.sampling_params import SamplingParams
from trtllm_jax.serve.http.errors import bad_request
from trtllm_jax.serve.protocol.base import GenerationRequest, ResponseFormat
from trtllm_jax.structured.params import GuidedDecodingParams

_SAME_NAME = (
    "best_of", "detokenize", "early_stopping", "frequency_penalty", "ignore_eos", "include_stop_str_in_output",
    "length_penalty", "min_p", "min_tokens", "n", "no_repeat_ngram_size", "presence_penalty", "prompt_ignore_length",
    "repetition_penalty", "skip_special_tokens", "spaces_between_special_tokens", "stop_token_ids", "top_k",
    "top_p_min", "truncate_prompt_tokens", "use_beam_search",
)  # fmt: skip


def sampling_params(body: GenerationRequest, vocab: int, **renamed: Any) -> SamplingParams:
    """The sampling parameters of a request; temperature and top_p are 1.0 where they are not given, as OpenAI has it.

    Args:
        body: the request.
        vocab: ids of the model are 0 to vocab - 1.
        renamed: parameters that the endpoints name differently; None leaves one out.

    Raises:
        ValueError: a parameter is wrong, or two of them contradict each other.
    """
    same = {name: getattr(body, name) for name in _SAME_NAME}
    given = {
        **same,
        "early_stopping": body.early_stopping or None,
        "embedding_bias": _logit_bias(body.logit_bias, vocab),
        "seed": None if body.seed is None else body.seed % (1 << 64),
        "stop": body.stops or None,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        **renamed,
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def guided_decoding_params(
    response_format: ResponseFormat | None, grammar: str | None = None
) -> GuidedDecodingParams | None:
    """`GuidedDecodingParams` of a response_format, None for any text; a `grammar` of the whole answer outweighs it.

    ApiError where the content of the response_format is missing.
    """
    arguments = guided_decoding_arguments(response_format) if grammar is None else {"grammar": grammar}
    return None if arguments is None else GuidedDecodingParams(**arguments)


def guided_decoding_arguments(response_format: ResponseFormat | None) -> dict[str, Any] | None:
    """The arguments of `GuidedDecodingParams`, None for any text. ApiError where content is missing."""
    if response_format is None or response_format.type == "text":
        return None
    match response_format.type:
        case "json_object":
            return {"json_object": True}
        case "json":
            return {"json": _require("response_format.schema", response_format.schema_)}
        case "json_schema":
            wrapped = _require("response_format.json_schema", response_format.json_schema)
            return {"json": _require("response_format.json_schema.schema", wrapped.schema_)}
        case "regex":
            return {"regex": _require("response_format.regex", response_format.regex)}
        case "ebnf":
            return {"grammar": _require("response_format.ebnf", response_format.ebnf)}


def _require(param: str, value: Any) -> Any:
    if value is None:
        raise bad_request(param, f"{param} is missing, which this type of response_format needs")
    return value


def _logit_bias(given: dict[str, float] | None, vocab: int) -> Any:
    """float32 [vocab], None for no bias."""
    if not given:
        return None
    bias = np.zeros(vocab, np.float32)
    for token, value in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab):
            raise bad_request("logit_bias", f"logit_bias holds {token[:40]!r}: ids of this model are 0 to {vocab - 1}")
        bias[int(token)] = value
    return bias
