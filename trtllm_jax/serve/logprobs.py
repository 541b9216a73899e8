"""Log-probabilities in OpenAI's two forms."""

from collections.abc import Mapping, Sequence
from typing import Any

from trtllm_jax.requests.outputs import Logprob
from trtllm_jax.serve.token_texts import TokenPosition, TokenTexts

_MIN_LOGPROB = -9999.0
"""What OpenAI reports of tokens that cannot come: JSON has no infinity."""

LogprobsByPosition = Sequence[Mapping[int, Logprob]]


def completion_logprobs(
    texts: TokenTexts,
    tokens: Sequence[int],
    positions: Sequence[TokenPosition],
    logprobs: LogprobsByPosition,
    top_count: int,
) -> dict[str, Any]:
    """Four parallel lists with the `top_count` likeliest tokens; a prompt's first token has no log-probability."""
    lists: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, position, candidates in zip(tokens, positions, logprobs, strict=True):
        top = _top_tokens(candidates, top_count)
        # The token itself comes first, so that no other one takes its name.
        names = texts.names([token, *top], position)
        lists["tokens"].append(names[token])
        lists["token_logprobs"].append(_finite(candidates[token]) if candidates else None)
        named = {names[one]: _finite(candidates[one]) for one in [*top, token]} if candidates else None
        lists["top_logprobs"].append(named)
        lists["text_offset"].append(position.offset)
    return lists


def chat_logprobs(
    texts: TokenTexts,
    tokens: Sequence[int],
    positions: Sequence[TokenPosition],
    logprobs: LogprobsByPosition,
    top_count: int,
) -> dict[str, Any]:
    """One record a token, with the `top_count` likeliest ones; the `bytes` of all tokens are those of the text."""
    content = []
    for token, position, candidates in zip(tokens, positions, logprobs, strict=True):
        top = _top_tokens(candidates, top_count)
        records = {
            one: {
                "token": name,
                "logprob": _finite(candidates[one]),
                "bytes": list(position.token_bytes if one == token else texts.token_bytes(one, position.before)),
            }
            for one, name in texts.names([token, *top], position).items()
        }
        content.append({**records[token], "top_logprobs": [records[one] for one in top]})
    return {"content": content, "refusal": None}


def _top_tokens(candidates: Mapping[int, Logprob], count: int) -> list[int]:
    return [token for token, value in candidates.items() if value.rank is not None and value.rank <= count][:count]


def _finite(value: Logprob) -> float:
    return max(value.logprob, _MIN_LOGPROB)
