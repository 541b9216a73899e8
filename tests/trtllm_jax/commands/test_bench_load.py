"""Calls over real sockets to a server that answers as the test says; times are asserted only where they are bounds."""

import asyncio
import itertools
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from trtllm_jax.commands.bench.answer import Answer, RequestFailure
from trtllm_jax.commands.bench.http import Server
from trtllm_jax.commands.bench.load import Load, list_models, run_in_uvloop, run_load

from .scripted_server import STREAM, ScriptedServer, answer_well, chunk, event, http

BODY = '{"max_tokens": 3, "prompt": [1, 2], "stream_options": {"include_usage": true}}'
TOKEN = event({"choices": [{"text": "x", "finish_reason": None}]})
LAST = event({"choices": [{"text": "y", "finish_reason": "stop"}]})

EARLY = 0.005
"""Seconds by which a loop that counts milliseconds may be early."""


def load(port: int, count: int = 1, *, concurrency: int | None = None, timeout: float = 30.0, gap: float = 0) -> Load:
    due = [i * gap for i in range(count)]
    return Load(Server("localhost", port, "/v1"), "/completions", [BODY] * count, due, concurrency, timeout)


def run(work: Load, processes: int = 1) -> list[Answer]:
    answers: list[Answer] = []
    run_load(work, answers.append, processes)
    return answers


def says(*parts: bytes, close: bool = True) -> Callable[..., Any]:
    async def behave(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
        if close:
            writer.close()
        else:
            await asyncio.sleep(60)

    return behave


def together(count: int) -> Callable[..., Any]:
    """Answers calls once so many are there."""
    all_there = asyncio.Barrier(count)

    async def behave(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await all_there.wait()
        await answer_well(body, writer)

    return behave


def test_every_call_is_answered_and_connections_are_kept(server: ScriptedServer) -> None:
    server.behaviour = together(3)
    answers = run(load(server.port, 12, concurrency=3))
    assert [(one.failure, one.input_tokens, one.output_tokens, one.counted) for one in answers] == [
        ("", 2, 3, True)
    ] * 12
    for one in answers:
        assert 1 <= len(one.arrivals) <= 3
        times = [one.submitted, *one.arrivals, one.ended]
        assert times == sorted(times)
    assert len(server.bodies) == 12
    assert (server.most_at_once, server.connections) == (3, 3)


def test_without_a_bound_all_calls_are_there_at_once(server: ScriptedServer) -> None:
    server.behaviour = together(8)
    assert [one.failure for one in run(load(server.port, 8))] == [""] * 8


def test_no_call_is_sent_before_it_is_due(server: ScriptedServer) -> None:
    began = time.monotonic()
    submitted = sorted(one.submitted - began for one in run(load(server.port, 6, gap=0.03)))
    assert all(at >= 0.03 * i - EARLY for i, at in enumerate(submitted))


def test_several_processes_share_calls_and_bound(server: ScriptedServer) -> None:
    began = time.monotonic()
    answers = run(load(server.port, 9, concurrency=4, gap=0.01), processes=3)
    assert [one.failure for one in answers] == [""] * 9
    assert all(began < one.submitted < time.monotonic() for one in answers)
    assert len(server.bodies) == 9
    assert server.most_at_once <= 4


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("bound", [None, 1, 2, 7])
def test_shares_are_everything_once(processes: int, bound: int | None) -> None:
    whole = Load(Server("x", 1), "/", [str(i) for i in range(7)], list(range(7)), bound, 1.0)
    shares = whole.split(processes)
    assert len(shares) == min(processes, 7, bound or 7)
    pairs = [pair for share in shares for pair in zip(share.bodies, share.arrivals, strict=True)]
    assert sorted(pairs) == [(str(i), i) for i in range(7)]
    assert all(share.bodies for share in shares)
    if bound:
        assert sum(share.concurrency or 0 for share in shares) == bound
        assert all(share.concurrency for share in shares)


@pytest.mark.parametrize(
    ("answer", "kind", "detail"),
    [
        (http("500 Oops", b'{"error": {"message": "broken"}}'), "HTTP 500", "broken"),
        (http("429 Too Many Requests", b"later", "retry-after: 1"), "HTTP 429", "later"),
        (http("404 Not Found", b""), "HTTP 404", "''"),
        (STREAM + chunk(TOKEN), "connection lost", "before the answer ended"),
        (STREAM + chunk(TOKEN)[:-9], "connection lost", "before the answer ended"),
        (STREAM + chunk(TOKEN) + chunk(b""), "incomplete answer", "no finish_reason"),
        (b"", "connection lost", "before the answer ended"),
        (b"HTTP/1.1 200 OK\r\n", "connection lost", "before the answer ended"),
        (b"SSH-2.0-OpenSSH\r\n", "malformed HTTP", ""),
        (STREAM + b"zz\r\n", "malformed HTTP", ""),
        (STREAM + chunk(event(b"{")), "malformed event", "'{'"),
        (STREAM + chunk(event({"error": {"message": "died"}})), "error in the stream", "died"),
        (http("200 OK", b'{"choices": [{"text": "whole"}]}'), "incomplete answer", "whole"),
    ],
)
def test_failures_have_a_kind(server: ScriptedServer, answer: bytes, kind: str, detail: str) -> None:
    server.behaviour = says(answer)
    (one,) = run(load(server.port))
    assert one.failure == kind
    assert detail in one.detail


@pytest.mark.parametrize("parts", [[], [STREAM], [STREAM, chunk(TOKEN)]])
def test_a_server_that_stops_answering_is_a_timeout(server: ScriptedServer, parts: list[bytes]) -> None:
    server.behaviour = says(*parts, close=False)
    answers = run(load(server.port, 3, timeout=0.1))
    assert [(one.failure, one.detail) for one in answers] == [("timeout", "no complete answer within 0.1 s")] * 3
    assert all(one.ended - one.submitted >= 0.1 - EARLY for one in answers)


def test_nobody_listens() -> None:
    with socket.socket() as bound:  # which does not listen
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        assert [one.failure for one in run(load(port, 2))] == ["connection refused"] * 2


def test_some_calls_fail_and_the_others_are_measured(server: ScriptedServer) -> None:
    numbers = itertools.count()

    async def every_third_is_refused(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if next(numbers) % 3:
            await answer_well(body, writer)
        else:
            writer.write(http("429 Too Many Requests", b"{}"))

    server.behaviour = every_third_is_refused
    failures = [one.failure for one in run(load(server.port, 9, concurrency=1))]
    assert failures == ["HTTP 429", "", ""] * 3
    assert server.connections == 1  # a http_failure leaves the connection as it is


def test_an_answer_may_end_with_its_connection(server: ScriptedServer) -> None:
    server.behaviour = says(b"HTTP/1.1 200 OK\r\n\r\n", TOKEN, LAST)
    answers = run(load(server.port, 2, concurrency=1))
    assert [(one.failure, one.output_tokens) for one in answers] == [("", 2)] * 2
    assert server.connections == 2


def test_a_kept_connection_that_the_server_closed_is_no_failure(server: ScriptedServer) -> None:
    answered: set[asyncio.StreamWriter] = set()

    async def close_at_the_second_call(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if writer in answered:
            writer.close()
        else:
            answered.add(writer)
            await answer_well(body, writer)

    server.behaviour = close_at_the_second_call
    assert [one.failure for one in run(load(server.port, 3, concurrency=1))] == [""] * 3
    assert server.connections == 3


def test_interruption_keeps_what_was_answered(server: ScriptedServer) -> None:
    numbers = itertools.count()

    async def two_answers(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if next(numbers) < 2:
            await answer_well(body, writer)
        else:
            await asyncio.sleep(60)

    server.behaviour = two_answers
    main, answers = threading.main_thread().ident, list[Answer]()
    assert main is not None

    def interrupt() -> None:
        while len(answers) < 2:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_load(load(server.port, 4), answers.append)
    assert [one.failure for one in answers] == ["", ""]


def test_models(server: ScriptedServer) -> None:
    assert run_in_uvloop(list_models(Server.of(server.base_url), 10.0)) == ["first", "second"]
    with pytest.raises(RequestFailure, match="connection lost"):
        run_in_uvloop(list_models(Server.of(f"http://localhost:{server.port}/v2"), 10.0))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:8000/v1", Server("localhost", 8000, "/v1")),
        ("http://localhost/v1/", Server("localhost", 80, "/v1")),
        ("https://localhost", Server("localhost", 443, "", True)),
        ("http://[::1]:9/a/b", Server("::1", 9, "/a/b")),
    ],
)
def test_urls(url: str, expected: Server) -> None:
    assert Server.of(url) == expected
    assert Server.of(url, "key").request_head("POST", "/x", 5).count(b"Authorization: Bearer key\r\n") == 1


def test_the_host_of_an_ipv6_address_is_bracketed() -> None:
    assert b"\r\nHost: [::1]:9\r\n" in Server.of("http://[::1]:9").request_head("GET", "/models", 0)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:y/", "http://x/?a=1", "http://x/\n"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        Server.of(url)
