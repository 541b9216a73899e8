"""Load on a server: calls sent on time, in this process or in several, and their answers as they come.

    python -P -m trtllm_jax.commands.bench.load

is one of several processes. Its stdin holds its share as a line of JSON, and then a line with the time to begin.
"""

import asyncio
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from queue import SimpleQueue
from typing import Any

import uvloop

from trtllm_jax.commands.bench.answer import Answer, AnswerReader, RequestFailure, refusal
from trtllm_jax.commands.bench.http import Client, Server

OnAnswer = Callable[[Answer], object]

START_DELAY = 0.05
"""Seconds between the time to begin being sent to the processes and its being there."""


@dataclass(frozen=True)
class Load:
    """Calls of one endpoint.

    Attributes:
        server: who is called.
        path: of the endpoint, after the server's own.
        bodies: JSON, one a call.
        arrivals: seconds after the start at which each is due.
        concurrency: calls in flight at most; None for no bound.
        timeout: seconds after which a call has failed.
    """

    server: Server
    path: str
    bodies: Sequence[str]
    arrivals: Sequence[float]
    concurrency: int | None
    timeout: float

    def shares(self, count: int) -> list["Load"]:
        """At most `count` parts of it, so that each has calls and none a bound of 0."""
        count = min(count, len(self.bodies), self.concurrency or count)
        return [
            replace(
                self,
                bodies=self.bodies[i::count],
                arrivals=self.arrivals[i::count],
                concurrency=self.concurrency and len(range(i, self.concurrency, count)),
            )
            for i in range(count)
        ]


def run_load(load: Load, on_answer: OnAnswer, processes: int = 1) -> float:
    """Calls `on_answer` with each answer, in the order in which they end; the busiest client's share of a core.

    Near 1 the client was the bottleneck. KeyboardInterrupt ends all calls that have no answer yet. ValueError: one of
    the processes died.
    """
    shares = load.shares(processes)
    return _run_here(load, on_answer, time.monotonic()) if len(shares) == 1 else _run_apart(shares, on_answer)


async def call(client: Client, path: str, body: bytes, timeout: float) -> Answer:
    """One call and what became of it."""
    reader, submitted = AnswerReader(), time.monotonic()
    try:
        try:
            async with asyncio.timeout(timeout):
                status = await client.exchange("POST", path, body, reader.feed)
        except TimeoutError:
            raise RequestFailure("timeout", f"no complete answer within {timeout:g} s") from None
        if status != 200:
            raise refusal(status, reader.beginning)
        return reader.answer(submitted, time.monotonic())
    except RequestFailure as failure:
        return Answer(submitted, time.monotonic(), failure=failure.kind, detail=failure.detail)


async def list_models(server: Server, timeout: float) -> list[str]:
    """What /models names; RequestFailure where it does not answer so."""
    client, parts = Client(server), list[bytes]()
    try:
        async with asyncio.timeout(timeout):
            status = await client.exchange("GET", "/models", b"", lambda data, _: parts.append(data))
    except TimeoutError:
        raise RequestFailure("timeout", f"no answer within {timeout:g} s") from None
    finally:
        client.close()
    if status != 200:
        raise refusal(status, b"".join(parts))
    try:
        return [str(model["id"]) for model in json.loads(b"".join(parts))["data"]]
    except (ValueError, TypeError, KeyError) as error:
        raise RequestFailure("malformed answer", 'it is no {"data": [{"id": ...}]}') from error


def in_loop(task: Any) -> Any:
    """The result of a coroutine, run in a loop of uvloop, which takes a third of asyncio's own time."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(task)


def _run_here(load: Load, on_answer: OnAnswer, began: float) -> float:
    _raise_file_limit()
    cpu, started = time.process_time(), time.monotonic()
    in_loop(_run(load, on_answer, began))
    return (time.process_time() - cpu) / (time.monotonic() - started)


async def _run(load: Load, on_answer: OnAnswer, began: float) -> None:
    client = Client(load.server)
    gate: AbstractAsyncContextManager[Any] = asyncio.Semaphore(load.concurrency) if load.concurrency else nullcontext()

    async def run(body: bytes, due: float) -> None:
        await asyncio.sleep(began + due - time.monotonic())
        async with gate:
            on_answer(await call(client, load.path, body, load.timeout))

    try:
        async with asyncio.TaskGroup() as tasks:
            for body, due in zip(load.bodies, load.arrivals, strict=True):
                tasks.create_task(run(body.encode(), due))
    finally:
        client.close()


def _raise_file_limit() -> None:
    """Each connection is a file, and shells often allow 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _run_apart(shares: Sequence[Load], on_answer: OnAnswer) -> float:
    command = [sys.executable, "-P", "-m", __spec__.name]
    lines: SimpleQueue[str | None] = SimpleQueue()
    busiest = 0.0
    with ExitStack() as stack:
        children = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in shares
        ]
        for child in children:
            stack.callback(child.kill)
        for child, share in zip(children, shares, strict=True):
            _write(child, json.dumps(asdict(share)))
        for child in children:
            if not child.stdout or not child.stdout.readline():
                raise ValueError(f"a client process ended with exit code {child.wait()} before it began; see above")
        for child in children:
            _write(child, str(time.monotonic() + START_DELAY))
            threading.Thread(target=_forward, args=(child, lines), daemon=True).start()
        running = len(children)
        while running:
            line = lines.get()
            if line is None:
                running -= 1
            elif "busy" in (record := json.loads(line)):
                busiest = max(busiest, record["busy"])
            else:
                on_answer(Answer(**record | {"arrivals": tuple(record["arrivals"])}))
        for child in children:
            if child.wait():
                raise ValueError(f"a client process ended with exit code {child.returncode}; see above")
    return busiest


def _write(child: "subprocess.Popen[str]", line: str) -> None:
    assert child.stdin
    with suppress(BrokenPipeError):  # whoever reads from it notices that it ended
        child.stdin.write(f"{line}\n")
        child.stdin.flush()


def _forward(child: "subprocess.Popen[str]", lines: "SimpleQueue[str | None]") -> None:
    for line in child.stdout or ():
        lines.put(line)
    lines.put(None)


def main() -> None:
    """Be one of several processes."""

    def say(record: Any) -> None:
        sys.stdout.write(f"{json.dumps(record)}\n")
        sys.stdout.flush()

    try:
        work = json.loads(sys.stdin.readline())
        load = Load(**work | {"server": Server(**work["server"])})
        say("ready")
        busy = _run_here(load, lambda answer: say(vars(answer)), began=float(sys.stdin.readline()))
    except KeyboardInterrupt:
        sys.exit(130)
    say({"busy": busy})


if __name__ == "__main__":
    main()
