"""A short soak; `make soak` is the long one. And what it looks for is found where it is."""

import asyncio
import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from . import clients, run
from .server import Server
from .wire import Connection, request


@pytest.mark.slow
def test_a_short_soak_leaves_nothing(server: Server) -> None:
    report = run.soak(server, 6, count=12, seed=1, growth=256 << 20)
    assert not report.wrong
    assert {kind for kind, _ in report.seen} >= {"plain", "stream", "refused", "leaver"}
    assert report.delays


@pytest.mark.slow
def test_clients_that_neither_read_nor_write_hold_up_nobody(server: Server) -> None:
    address = (server.host, server.port)
    same = {"model": "tiny", "prompt": "Once", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    endless = request({"model": "tiny", "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True})

    async def answers() -> list[str]:
        async with contextlib.AsyncExitStack() as held:
            for number in range(60):
                connection = await held.enter_async_context(Connection(*address))
                # Half of a request line, half of a body, or a whole request whose answer is never read.
                await connection.send((b"POST /v1/comp", endless[:-20], endless)[number % 3])
            return [json.loads((await clients.ask(address, same))[1])["choices"][0]["text"] for _ in range(5)]

    assert set(asyncio.run(answers())) == {server.complete()}


def at_rest(server: Server) -> tuple[run.Sample, int]:
    """What the server holds, and its tasks, once nothing of earlier clients comes or goes."""
    while True:
        before, tasks = run.sample(server), len(server.tasks())
        time.sleep(0.5)
        if (run.sample(server).files, len(server.tasks())) == (before.files, tasks):
            return before, tasks


@pytest.mark.slow
def test_what_is_held_is_seen(server: Server) -> None:
    before, tasks = at_rest(server)

    async def hold() -> list[str]:
        async with Connection(server.host, server.port) as connection:
            await connection.send(request({"model": "tiny", "prompt": "a"})[:-3])
            while len(left := await asyncio.to_thread(run._left, server, before, tasks)) < 2:
                await asyncio.sleep(0.01)
            return left

    files, running = asyncio.run(hold())
    assert files.startswith("files of the processes were")
    assert running.startswith(f"there were {tasks} tasks and there are")
    assert run.settle(server, before, tasks) == []


@pytest.mark.slow
def test_a_process_that_passes_is_no_sample_and_is_seen_while_it_is_there(server: Server) -> None:
    before, tasks = at_rest(server)
    form = {"type": "regex", "regex": "(this|was|not|asked|before)+"}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.complete, response_format=form)
        seen = set()
        while not asked.done():
            seen.add("processes" in str(run._left(server, before, tasks)))
            assert len(run.sample(server).memory) == len(before.memory)
    assert True in seen
    assert run.settle(server, before, tasks) == []


def test_growth_is_of_each_process_and_not_of_its_start() -> None:
    steps = np.linspace(0, 1, 41)
    report = run.Report()
    report.samples = [run.Sample(t, [100, int(1000 * t), min(500, int(5000 * t))], [], []) for t in steps.tolist()]
    flat, steady, early = report.growth()
    assert (flat, early) == (0, 0)
    assert steady == pytest.approx(500, abs=30)
