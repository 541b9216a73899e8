"""Log-probabilities in OpenAI's two forms."""

from collections.abc import Mapping, Sequence
from typing import Any

from trtllm_jax.requests.outputs import Logprob
from trtllm_jax.serve.token_texts import Place, TokenTexts

_LEAST = -9999.0
"""What OpenAI reports of tokens that cannot come: JSON has no infinity."""

Positions = Sequence[Mapping[int, Logprob]]


def for_completions(
    texts: TokenTexts, tokens: Sequence[int], places: Sequence[Place], positions: Positions, count: int
) -> dict[str, Any]:
    """Four parallel lists with the `count` likeliest. A first prompt token, whose position is empty, has no values."""
    written: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, place, at in zip(tokens, places, positions, strict=True):
        likeliest = _likeliest(at, count)
        # The token itself has its name first, so that it is found under it.
        names = texts.names([token, *likeliest], place)
        written["tokens"].append(names[token])
        written["token_logprobs"].append(_number(at[token]) if at else None)
        written["top_logprobs"].append({names[one]: _number(at[one]) for one in [*likeliest, token]} if at else None)
        written["text_offset"].append(place.offset)
    return written


def for_chat(
    texts: TokenTexts, tokens: Sequence[int], places: Sequence[Place], positions: Positions, count: int
) -> dict[str, Any]:
    """One record a token, with the `count` likeliest ones in its place; the `bytes` of all tokens are the text's."""
    content = []
    for token, place, at in zip(tokens, places, positions, strict=True):
        likeliest = _likeliest(at, count)
        records = {
            one: {
                "token": name,
                "logprob": _number(at[one]),
                "bytes": list(place.written if one == token else texts.written(one, place.before)),
            }
            for one, name in texts.names([token, *likeliest], place).items()
        }
        content.append({**records[token], "top_logprobs": [records[one] for one in likeliest]})
    return {"content": content, "refusal": None}


def _likeliest(at: Mapping[int, Logprob], count: int) -> list[int]:
    return [token for token, value in at.items() if value.rank is not None and value.rank <= count][:count]


def _number(value: Logprob) -> float:
    return max(value.logprob, _LEAST)
