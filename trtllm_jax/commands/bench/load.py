"""Load on a server: sends requests at given times, from this process or from several.

    python -P -m trtllm_jax.commands.bench.load

runs one of several client processes. It reads its part of the load from stdin as a line of JSON, then a line with the
time to start.
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

from trtllm_jax.commands.bench.answer import Answer, AnswerParser, RequestFailure, http_failure
from trtllm_jax.commands.bench.http import Client, Server

OnAnswer = Callable[[Answer], object]

START_DELAY = 0.05
"""Seconds from sending the start time to the processes until that time."""


@dataclass(frozen=True)
class Load:
    """Requests to one endpoint.

    Attributes:
        server: the address of the server.
        path: the endpoint's path, after the server's prefix.
        bodies: the requests' bodies as JSON.
        arrivals: seconds after the start at which each request is due.
        concurrency: most requests in flight; None for no bound.
        timeout: seconds after which a request counts as failed.
    """

    server: Server
    path: str
    bodies: Sequence[str]
    arrivals: Sequence[float]
    concurrency: int | None
    timeout: float

    def split(self, count: int) -> list["Load"]:
        """At most `count` parts of the load, each with at least one request and a concurrency of at least 1."""
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
    """Send all requests, and call `on_answer` with each answer when it ends.

    Returns the busiest client's share of a core: near 1, the client was the bottleneck. KeyboardInterrupt cancels the
    requests that have no answer yet. ValueError if a client process died.
    """
    parts = load.split(processes)
    if len(parts) == 1:
        return _run_in_this_process(load, on_answer, time.monotonic())
    return _run_in_processes(parts, on_answer)


async def send_request(client: Client, path: str, body: bytes, timeout: float) -> Answer:
    """Send one request and return its answer, or its failure as an `Answer`."""
    parser, submitted = AnswerParser(), time.monotonic()
    try:
        try:
            async with asyncio.timeout(timeout):
                status = await client.request("POST", path, body, parser.feed)
        except TimeoutError:
            raise RequestFailure("timeout", f"no complete answer within {timeout:g} s") from None
        if status != 200:
            raise http_failure(status, parser.beginning)
        return parser.answer(submitted, time.monotonic())
    except RequestFailure as failure:
        return Answer(submitted, time.monotonic(), failure=failure.kind, detail=failure.detail)


async def list_models(server: Server, timeout: float) -> list[str]:
    """The names that /models lists; RequestFailure if the server's answer is invalid."""
    client, parts = Client(server), list[bytes]()
    try:
        async with asyncio.timeout(timeout):
            status = await client.request("GET", "/models", b"", lambda data, _: parts.append(data))
    except TimeoutError:
        raise RequestFailure("timeout", f"no answer within {timeout:g} s") from None
    finally:
        client.close()
    if status != 200:
        raise http_failure(status, b"".join(parts))
    try:
        return [str(model["id"]) for model in json.loads(b"".join(parts))["data"]]
    except (ValueError, TypeError, KeyError) as error:
        raise RequestFailure("malformed answer", 'it is no {"data": [{"id": ...}]}') from error


def run_in_uvloop(task: Any) -> Any:
    """The result of a coroutine, run in uvloop's event loop, which takes a third of the time of asyncio's."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(task)


def _run_in_this_process(load: Load, on_answer: OnAnswer, began: float) -> float:
    _raise_file_limit()
    cpu, started = time.process_time(), time.monotonic()
    run_in_uvloop(_send_all(load, on_answer, began))
    return (time.process_time() - cpu) / (time.monotonic() - started)


async def _send_all(load: Load, on_answer: OnAnswer, began: float) -> None:
    client = Client(load.server)
    semaphore: AbstractAsyncContextManager[Any] = (
        asyncio.Semaphore(load.concurrency) if load.concurrency else nullcontext()
    )

    async def run(body: bytes, due: float) -> None:
        await asyncio.sleep(began + due - time.monotonic())
        async with semaphore:
            on_answer(await send_request(client, load.path, body, load.timeout))

    try:
        async with asyncio.TaskGroup() as tasks:
            for body, due in zip(load.bodies, load.arrivals, strict=True):
                tasks.create_task(run(body.encode(), due))
    finally:
        client.close()


def _raise_file_limit() -> None:
    """Raise the limit of open files to the maximum: each connection needs one, and the default is often 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _run_in_processes(parts: Sequence[Load], on_answer: OnAnswer) -> float:
    command = [sys.executable, "-P", "-m", __spec__.name]
    lines: SimpleQueue[str | None] = SimpleQueue()
    busiest = 0.0
    with ExitStack() as stack:
        children = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in parts
        ]
        for child in children:
            stack.callback(child.kill)
        for child, part in zip(children, parts, strict=True):
            _write(child, json.dumps(asdict(part)))
        for child in children:
            if not child.stdout or not child.stdout.readline():
                raise ValueError(f"a client process ended with exit code {child.wait()} before it began; see above")
        for child in children:
            _write(child, str(time.monotonic() + START_DELAY))
            threading.Thread(target=_forward_lines, args=(child, lines), daemon=True).start()
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
    with suppress(BrokenPipeError):  # reading the child's output reports that it has ended
        child.stdin.write(f"{line}\n")
        child.stdin.flush()


def _forward_lines(child: "subprocess.Popen[str]", lines: "SimpleQueue[str | None]") -> None:
    for line in child.stdout or ():
        lines.put(line)
    lines.put(None)


def main() -> None:
    """Run as one of several client processes."""

    def write_record(record: Any) -> None:
        sys.stdout.write(f"{json.dumps(record)}\n")
        sys.stdout.flush()

    try:
        work = json.loads(sys.stdin.readline())
        load = Load(**work | {"server": Server(**work["server"])})
        write_record("ready")
        busy = _run_in_this_process(load, lambda answer: write_record(vars(answer)), began=float(sys.stdin.readline()))
    except KeyboardInterrupt:
        sys.exit(130)
    write_record({"busy": busy})


if __name__ == "__main__":
    main()
