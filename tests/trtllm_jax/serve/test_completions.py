"""/v1/completions as OpenAI's client sees it, against transformers' greedy text and the engine's own answers."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from openai import BadRequestError, OpenAI

from trtllm_jax import LLM, SamplingParams

Logits = Callable[[list[int]], np.ndarray]
Greedy = Callable[[list[int], int], list[int]]


def joined(stream: Any) -> dict[int, dict[str, Any]]:
    """What a stream's events add up to, by choice."""
    choices: dict[int, dict[str, Any]] = {}
    for event in stream:
        for choice in event.choices:
            whole = choices.setdefault(choice.index, {"text": "", "finish_reason": None, "tokens": [], "offsets": []})
            assert whole["finish_reason"] is None, "nothing comes after the end"
            whole["text"] += choice.text
            whole["finish_reason"] = choice.finish_reason
            if choice.logprobs:
                whole["tokens"] += choice.logprobs.tokens
                whole["offsets"] += choice.logprobs.text_offset
    return choices


def test_greedy_text_is_that_of_transformers(client: OpenAI, tiny_llm: LLM, greedy_by_transformers: Greedy) -> None:
    ids = tiny_llm.tokenizer.encode("hello")
    answer = client.completions.create(
        model="tiny", prompt="hello", temperature=0, extra_body={"ignore_eos": True, "skip_special_tokens": False}
    )
    choice = answer.choices[0]
    assert choice.text == tiny_llm.tokenizer.decode(greedy_by_transformers(ids, 16), skip_special_tokens=False)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert answer.system_fingerprint.startswith("fp_")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 16, 21)
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_prompts_of_every_kind_in_order(client: OpenAI, tiny_llm: LLM) -> None:
    texts = ["hello", "a fox", "x"]
    ids = [tiny_llm.tokenizer.encode(text) for text in texts]
    params = SamplingParams(max_tokens=16)
    expected = [output.outputs[0].text for output in tiny_llm.generate(texts, params)]
    for prompt, wanted in ((texts, expected), (ids, expected), (ids[1], expected[1:2]), (texts[0], expected[:1])):
        answer = client.completions.create(model="tiny/alias", prompt=prompt, temperature=0)
        assert [choice.text for choice in answer.choices] == wanted
        assert [choice.index for choice in answer.choices] == list(range(len(wanted)))
        streamed = joined(client.completions.create(model="tiny", prompt=prompt, temperature=0, stream=True))
        assert [streamed[i]["text"] for i in range(len(wanted))] == wanted


def test_seeds_repeat_and_several_answers_differ(client: OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.completions.create(model="tiny", prompt=["hello", "x"], n=2, seed=-5, max_tokens=12, **more)

    one = [choice.text for choice in ask().choices]
    assert len(set(one)) == 4
    assert [choice.text for choice in ask().choices] == one
    streamed = joined(ask(stream=True))
    assert [streamed[i]["text"] for i in range(4)] == one
    assert {streamed[i]["finish_reason"] for i in range(4)} <= {"stop", "length"}


def test_best_of_gives_the_likeliest(client: OpenAI) -> None:
    ask = {"model": "tiny", "prompt": "hello", "seed": 3, "max_tokens": 6, "logprobs": 0}
    every = client.completions.create(**ask, n=4).choices
    sums = [sum(choice.logprobs.token_logprobs) for choice in every]
    best = client.completions.create(**ask, n=1, best_of=4).choices
    assert [choice.text for choice in best] == [every[int(np.argmax(sums))].text]
    with pytest.raises(BadRequestError, match="best_of") as refused:
        client.completions.create(**ask, n=1, best_of=4, stream=True)
    assert refused.value.param == "best_of"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_and_ids(client: OpenAI, tiny_llm: LLM, stream: bool) -> None:
    free = tiny_llm.generate("hello", SamplingParams(max_tokens=16, ignore_eos=True)).outputs[0]
    text, third = free.text, free.token_ids[2]
    plain = next(i for i in range(1, len(text)) if text[i].isascii())
    stop = text[plain]
    ask = {"model": "tiny", "prompt": "hello", "temperature": 0, "stream": stream}

    def end(**more: Any) -> tuple[str, str, Any]:
        answer = client.completions.create(**ask, **more)
        if not stream:
            choice = answer.choices[0]
            return choice.text, choice.finish_reason, choice.stop_reason
        events = [event.choices[0] for event in answer]
        return "".join(event.text for event in events), events[-1].finish_reason, events[-1].stop_reason

    ignore = {"ignore_eos": True}
    assert end(stop=stop, extra_body=ignore) == (text[: text.index(stop)], "stop", stop)
    kept = {**ignore, "include_stop_str_in_output": True}
    assert end(stop=["never", stop], extra_body=kept)[0] == text[: text.index(stop) + 1]
    assert end(extra_body={**ignore, "stop_token_ids": [third]})[1:] == ("stop", third)
    assert end(stop=[], extra_body=ignore)[:2] == (text, "length")


def test_logprobs_are_those_of_transformers(
    client: OpenAI, tiny_llm: LLM, logits_by_transformers: Logits, greedy_by_transformers: Greedy
) -> None:
    prompt = tiny_llm.tokenizer.encode("hello")
    more = greedy_by_transformers(prompt, 5)
    logits = logits_by_transformers([*prompt, *more])
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    answer = client.completions.create(
        model="tiny", prompt="hello", temperature=0, max_tokens=5, logprobs=3, echo=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    choice = answer.choices[0]
    got, every = choice.logprobs, [*prompt, *more]
    texts = [tiny_llm.tokenizer.piece(token).text for token in every]
    assert [re.sub(r"^bytes:.*", "\ufffd", name) for name in got.tokens] == texts
    assert got.token_logprobs[0] is None
    assert got.top_logprobs[0] is None
    expected = [logits[i, token] for i, token in enumerate(every[1:])]
    assert got.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    for at, row in zip(got.top_logprobs[1:], logits, strict=False):
        assert max(at.values()) == pytest.approx(row.max(), abs=1e-4)
    assert got.text_offset[:6] == [0, 1, 2, 3, 4, 5]
    assert choice.text.startswith("hello")
    streamed = joined(
        client.completions.create(
            model="tiny", prompt="hello", temperature=0, max_tokens=5, logprobs=3, echo=True, stream=True,
            extra_body={"ignore_eos": True},
        )
    )[0]  # fmt: skip
    assert streamed["text"] == choice.text
    assert streamed["tokens"] == got.tokens
    assert streamed["offsets"][:6] == got.text_offset[:6]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone_scores_a_text(client: OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model="tiny", prompt="score me", max_tokens=0, echo=True, logprobs=1, stream=stream, temperature=0
    )
    events = list(answer) if stream else [answer]
    choices = [choice for event in events for choice in event.choices]
    assert "".join(choice.text for choice in choices) == "score me"
    assert choices[-1].finish_reason == "length"
    logprobs = [value for choice in choices for value in choice.logprobs.token_logprobs]
    assert logprobs[0] is None
    assert len(logprobs) == 8
    assert all(value < 0 for value in logprobs[1:])
    if not stream:
        assert answer.usage.completion_tokens == 0


def test_logit_bias_forces_and_bans(client: OpenAI, tiny_llm: LLM) -> None:
    a, b = tiny_llm.tokenizer.encode("ab")
    ask = {"model": "tiny", "prompt": "hello", "max_tokens": 4}
    assert client.completions.create(**ask, logit_bias={str(a): 100}, seed=1).choices[0].text == "aaaa"
    banned = client.completions.create(**ask, logit_bias={str(a): 100, str(b): 100, "256": -100}, temperature=0)
    assert set(banned.choices[0].text) <= {"a", "b"}
    first = tiny_llm.generate("hello", SamplingParams(max_tokens=1)).outputs[0].token_ids[0]
    other = client.completions.create(
        **ask, logit_bias={str(first): -100}, temperature=0, extra_body={"detokenize": False}
    )
    assert other.choices[0].token_ids[0] != first
    for wrong in ({"258": 1}, {"x": 1}, {"-1": 1}, {"٣": 1}):
        with pytest.raises(BadRequestError, match="logit_bias holds") as refused:
            client.completions.create(**ask, logit_bias=wrong)
        assert refused.value.param == "logit_bias"


def test_usage_in_a_stream(client: OpenAI) -> None:
    ask = {"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0, "stream": True}
    ask["extra_body"] = {"ignore_eos": True}
    plain = list(client.completions.create(**ask))
    assert all(event.usage is None and event.choices for event in plain)
    *events, last = client.completions.create(**ask, stream_options={"include_usage": True})
    assert all(event.usage is None for event in events)
    assert (last.choices, last.usage.completion_tokens, last.usage.prompt_tokens) == ([], 6, 5)
    counted = list(
        client.completions.create(**ask, stream_options={"include_usage": False, "continuous_usage_stats": True})
    )
    sums = [event.usage.completion_tokens for event in counted]
    assert sums == sorted(sums)
    assert sums[-1] == 6
    assert len({event.id for event in counted}) == 1


def test_further_fields_of_tensorrt_llm(client: OpenAI, tiny_llm: LLM) -> None:
    free = SamplingParams(max_tokens=8, ignore_eos=True)
    expected = tiny_llm.generate("world", free).outputs[0]

    def ask(prompt: str, **more: Any) -> Any:
        body = {"ignore_eos": True, **more}
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=8, extra_body=body)

    assert ask("hello world", top_k=1, truncate_prompt_tokens=5).choices[0].text == expected.text
    ids = ask("world", top_k=1, detokenize=False, cache_salt="mine").choices[0]
    assert (ids.token_ids, ids.text) == (expected.token_ids, "")
    assert len(set(ask("world", top_k=1, no_repeat_ngram_size=1, detokenize=False).choices[0].token_ids)) == 8
    capped = client.completions.create(model="tiny", prompt="x" * 150, max_tokens=5000, extra_body={"ignore_eos": True})
    assert capped.usage.completion_tokens == 10


def test_a_token_that_cannot_come_has_a_finite_logprob(client: OpenAI, tiny_llm: LLM) -> None:
    (a,) = tiny_llm.tokenizer.encode("a")
    answer = client.completions.create(model="tiny", prompt="x", max_tokens=2, logprobs=5, logit_bias={str(a): -100})
    assert all(math.isfinite(value) for at in answer.choices[0].logprobs.top_logprobs for value in at.values())
