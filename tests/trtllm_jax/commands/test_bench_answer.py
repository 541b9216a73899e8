"""Streams cut everywhere, with time stamps that the test chooses."""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from trtllm_jax.commands.bench.answer import MAX_LINE, AnswerParser, EventParser, RequestFailure, http_failure


def events(*records: Any) -> bytes:
    parts = (one if isinstance(one, bytes) else json.dumps(one).encode() for one in records)
    return b"".join(b"data: " + part + b"\n\n" for part in parts)


def text(words: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": words, "finish_reason": finish}]}


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields, "finish_reason": finish}]}


def usage(prompt: int, output: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}}


def read(reads: Iterable[tuple[float, bytes]]) -> AnswerParser:
    reader = AnswerParser()
    for now, data in reads:
        reader.feed(data, now)
    return reader


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_events_are_the_same_wherever_the_stream_is_cut(end: bytes) -> None:
    lines = (b": comment", b"event: x", b"data: one", b"", b"data:two", b"data: more", b"id: 3", b"", b"", b"data: cut")
    stream = end.join(lines)
    for cut in range(len(stream)):
        reader = EventParser()
        found = [*reader.feed(stream[:cut]), *reader.feed(stream[cut:])]
        assert found == [b"one", b"two\nmore"]


def test_a_completion() -> None:
    reader = read([(1.0, events(text(" a"))), (1.5, events(text(" b"))), (1.75, events(text("", "length")))])
    reader.feed(events(usage(7, 2), b"[DONE]"), 1.8)
    answer = reader.answer(0.5, 2.0)
    assert answer.arrivals == (1.0, 1.5)  # the last event brought no text
    assert (answer.input_tokens, answer.output_tokens, answer.counted, answer.failure) == (7, 2, True, "")
    assert (answer.submitted, answer.ended) == (0.5, 2.0)


def test_several_tokens_of_one_read_are_one_arrival() -> None:
    both = events(text(" a"), text(" b"))
    answer = read([(1.0, both), (2.0, events(text(" c d e", "stop"), usage(3, 5)))]).answer(0.0, 2.0)
    assert answer.arrivals == (1.0, 2.0)
    assert answer.output_tokens == 5


def test_without_usage_events_with_text_count() -> None:
    answer = read([(1.0, events(text("a"), text("b"))), (2.0, events(text("", "stop"), b"[DONE]"))]).answer(0.0, 2.0)
    assert (answer.output_tokens, answer.counted, answer.input_tokens) == (2, False, None)


@pytest.mark.parametrize("field", ["content", "reasoning_content", "reasoning", "tool_calls"])
def test_the_role_of_a_chat_is_no_token(field: str) -> None:
    said = delta(**{field: [{"index": 0}] if field == "tool_calls" else "x"})
    answer = read([(1.0, events(delta(role="assistant", content=""))), (2.0, events(said, delta("stop")))]).answer(0, 3)
    assert answer.arrivals == (2.0,)
    assert answer.output_tokens == 1


def test_an_answer_without_text_arrives_when_it_is_finished() -> None:
    answer = read([(1.0, events(text(""))), (2.0, events(text("", "stop"))), (3.0, events(usage(4, 0)))]).answer(0, 3.0)
    assert (answer.arrivals, answer.output_tokens) == ((2.0,), 0)


@pytest.mark.parametrize(
    ("data", "kind", "detail"),
    [
        (events({"error": {"message": "out of\n memory"}}), "error in the stream", "out of memory"),
        (events({"error": "plain"}), "error in the stream", "plain"),
        (events(b"{"), "malformed event", "'{'"),
        (events(b"\xff"), "malformed event", ""),
        (events([1]), "malformed event", "[1]"),
        (events({"choices": [1]}), "malformed event", "choices"),
        (events({"choices": 1}), "malformed event", "choices"),
        (events({"choices": [{"delta": 5}]}), "malformed event", "delta"),
        (b"x" * (MAX_LINE + 1), "malformed event", "more than"),
    ],
)
def test_what_is_no_answer(data: bytes, kind: str, detail: str) -> None:
    with pytest.raises(RequestFailure) as caught:
        read([(1.0, data)])
    assert caught.value.kind == kind
    assert detail in caught.value.detail


@pytest.mark.parametrize("data", [b"", events(text("a")), b'{"choices": [{"text": "whole"}]}'])
def test_a_stream_that_ends_early(data: bytes) -> None:
    with pytest.raises(RequestFailure, match=r"^incomplete answer: no finish_reason or \[DONE\]; it begins '"):
        read([(1.0, data)]).answer(0.0, 2.0)


@pytest.mark.parametrize("wrong", [5, "x", [1], {"completion_tokens": "3"}, {"completion_tokens": -1}])
def test_a_usage_that_is_none_is_not_believed(wrong: Any) -> None:
    answer = read([(1.0, events(text("a", "stop"), {"choices": [], "usage": wrong}))]).answer(0.0, 2.0)
    assert (answer.output_tokens, answer.counted) == (1, False)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b'{"error": {"message": "slow down"}}', "slow down"),
        (b'{"object": "error", "message": "slow down"}', "slow down"),
        (b'{"detail": [1]}', "{'detail': [1]}"),
        (b"<html>", "'<html>'"),
        (b"[1]", "'[1]'"),
        (b"", "''"),
    ],
)
def test_refusals_keep_the_servers_words(body: bytes, detail: str) -> None:
    failure = http_failure(429, body)
    assert (failure.kind, failure.detail) == ("HTTP 429", detail)
