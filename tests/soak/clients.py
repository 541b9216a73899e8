"""The kinds of clients that a soaked server has, and what each must see. Each takes the server's address and a draw."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from .wire import Connection, request

Address = tuple[str, int]
Client = Callable[[Address, random.Random], Awaitable[int]]
"""Gives the status that it saw, 0 for a client that left; raises AssertionError where that is none it may see."""

REFUSED = {
    "no JSON": (b'{"model": "tiny",', 400),
    "NaN": (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400),
    "infinite": (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', 400),
    "huge number": (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400),
    "no UTF-8": (b'{"model": "tiny", "prompt": "\xff\xfe"}', 400),
    "half a character": (b'{"model": "tiny", "prompt": "\\ud800"}', 400),
    "deep": (b'{"model": "tiny", "prompt": ' + b"[" * 100_000, 400),
    "wrong types": ({"model": "tiny", "prompt": {"a": 1}, "n": "two"}, 400),
    "not an object": (b"null", 400),
    "unknown token": ({"model": "tiny", "prompt": [1 << 30]}, 400),
    "too long": ({"model": "tiny", "prompt": "a" * 100_000}, 400),
    "bad schema": ({"model": "tiny", "prompt": "a", "response_format": {"type": "regex", "regex": "("}}, 400),
    "other model": ({"model": "huge", "prompt": "a"}, 404),
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


CHANGES: tuple[dict[str, Any], ...] = (
    {}, {}, {}, {"repetition_penalty": 1.2}, {"frequency_penalty": 0.5},
    {"presence_penalty": 1.0, "logit_bias": {"97": 5}},
)  # fmt: skip
"""What an answer's logits may be changed by."""


def wanted(draw: random.Random, **more: Any) -> dict[str, Any]:
    """A completion of random length."""
    prompt = "".join(draw.choices("abcdefgh ", k=draw.choice((3, 20, 90))))
    length = draw.choice((1, 8, 40, 150))
    changes = draw.choice(CHANGES)
    return {"model": "tiny", "prompt": prompt, "max_tokens": length, "ignore_eos": True, **changes, **more}


def chat(draw: random.Random, **more: Any) -> dict[str, Any]:
    """A conversation."""
    words = "".join(draw.choices("abcdefgh ", k=draw.choice((3, 60))))
    return {"model": "tiny", "messages": [{"role": "user", "content": words}], "max_tokens": 30, **more}


async def ask(address: Address, body: Any, path: str = "/v1/completions", **how: Any) -> tuple[int, bytes]:
    """Status and body of a request that may be refused because the queue is full."""
    async with Connection(*address) as connection:
        await connection.send(request(body, path), **how)
        status, answer = await connection.answer()
    assert status in (200, 429), (status, answer[:300], str(body)[:300])
    return status, answer


async def plain(address: Address, draw: random.Random) -> int:
    """One answer, or several of a prompt, or of several prompts."""
    n, prompts = draw.choice(((1, 1), (1, 1), (3, 1), (2, 2)))
    body = wanted(draw, n=n, seed=draw.randrange(100))
    status, answer = await ask(address, {**body, "prompt": [body["prompt"]] * prompts})
    if status == 200:
        choices = json.loads(answer)["choices"]
        assert len(choices) == n * prompts, answer[:300]
        assert {choice["finish_reason"] for choice in choices} == {"length"}
    return status


async def stream(address: Address, draw: random.Random) -> int:
    """A stream, read to its end."""
    path, body = draw.choice(
        (("/v1/completions", wanted(draw, n=draw.choice((1, 3)))), ("/v1/chat/completions", chat(draw)))
    )
    status, answer = await ask(address, {**body, "stream": True}, path)
    assert status != 200 or b"data: [DONE]" in answer, answer[-300:]
    return status


async def guided(address: Address, draw: random.Random) -> int:
    """Text that a schema or a pattern forces, or a call of a tool."""
    form = draw.choice(
        ({"type": "json_schema", "json_schema": {"schema": SCHEMA}}, {"type": "regex", "regex": "(ab)+"})
    )
    forced = draw.choice(({"response_format": form}, {"tools": [TOOL], "tool_choice": "required"}))
    return (await ask(address, chat(draw, **forced, **draw.choice(CHANGES)), "/v1/chat/completions"))[0]


async def refused(address: Address, draw: random.Random) -> int:
    """A body that nobody can answer."""
    body, expected = REFUSED[draw.choice(sorted(REFUSED))]
    async with Connection(*address) as connection:
        await connection.send(request(body))
        status, answer = await connection.answer()
    assert status == expected, (status, answer[:300], str(body)[:300])
    return status


async def no_http(address: Address, draw: random.Random) -> int:
    """Bytes that are not HTTP."""
    async with Connection(*address) as connection:
        await connection.send(draw.randbytes(draw.choice((1, 100, 5000))) + b"\r\n\r\n")
        status, _ = await connection.answer()
    assert status in (0, 400)
    return status


async def slow_writer(address: Address, draw: random.Random) -> int:
    """Headers and body in small pieces, in about three seconds."""
    data = wanted(draw)
    return (await ask(address, data, piece=1 + len(request(data)) // 30, pause=0.1))[0]


async def slow_reader(address: Address, draw: random.Random) -> int:
    """Reads a few bytes at a time, and leaves at some point."""
    async with Connection(*address) as connection:
        await connection.send(request(wanted(draw, stream=True)))
        for _ in range(draw.randrange(20)):
            if not await connection.read_some(64):
                break
            await asyncio.sleep(0.1)
    return 0


async def leaver(address: Address, draw: random.Random) -> int:
    """Leaves at a random moment: within the headers, the body, the queue, the answer."""
    data = request(wanted(draw, stream=draw.random() < 0.5, n=draw.choice((1, 3)), max_tokens=300))
    async with Connection(*address) as connection:
        await connection.send(data[: draw.choice((1, draw.randrange(1, len(data)), len(data), len(data)))])
        await asyncio.sleep(draw.choice((0.0, 0.005, 0.02, 0.1, 0.5)))
    return 0


async def crowd(address: Address, draw: random.Random) -> int:
    """More sequences than the queue takes, at once."""
    statuses = await asyncio.gather(*(ask(address, wanted(draw, n=8, max_tokens=8)) for _ in range(4)))
    return max(status for status, _ in statuses)


async def keeper(address: Address, draw: random.Random) -> int:
    """Several requests over one connection, and then silence."""
    async with Connection(*address) as connection:
        for _ in range(3):
            await connection.send(request(wanted(draw, max_tokens=3), close=False))
            status, answer = await connection.measured()
            assert status in (200, 429), answer[:300]
        await asyncio.sleep(draw.random())
    return 0


KINDS: Mapping[str, tuple[Client, int]] = {
    client.__name__: (client, share)
    for client, share in (
        (plain, 8), (stream, 8), (guided, 3), (refused, 6), (no_http, 1), (slow_writer, 3), (slow_reader, 4),
        (leaver, 8), (crowd, 1), (keeper, 2),
    )
}  # fmt: skip
"""What the clients do, and how many of each there are among all."""
