"""`make soak`: clients of all kinds, well-behaved and not, on a real `trtllm-serve`, and then a look for what is left.

    python tests/soak/run.py [--seconds 600] [--clients 24] [--seed 1]

The exit status is 1 where a client saw what it may not see, an answer changed, or anything leaked: a page of the KV
cache, a sequence, a task, a thread, a file descriptor, a process, memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # as `tests.soak.run`, so that the modules beside it are found
    sys.path.insert(0, str(Path(__file__).parents[2]))
    __package__ = "tests.soak"

from . import clients
from .server import Server

QUEUE = 20
OPTIONS = ("--num_serve_frontends=2", f"--max_queue_size={QUEUE}", "--tool_parser=hermes")
BATCH = 4
POOL = 2
"""Threads that a frontend starts once it needs them, and keeps."""
EXPECTED_LINES = ("is served at", "Invalid HTTP request received.")
SETTLED = 30.0
"""Seconds after which nothing of the last client may be left."""


@dataclass
class Sample:
    """What the processes that serve hold: the engine's first."""

    seconds: float
    memory: list[int]
    threads: list[int]
    files: list[int]


@dataclass
class Report:
    """What a run saw, and what is wrong with it."""

    seen: Counter[tuple[str, int]] = field(default_factory=Counter)
    delays: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def growth(self) -> list[float]:
        """Bytes that each process gained from the second quarter of the samples to the last, by their medians."""
        memory = np.array([sample.memory for sample in self.samples], float)
        quarter = len(memory) // 4
        gained = np.median(memory[-quarter:], axis=0) - np.median(memory[quarter : 2 * quarter], axis=0)
        return [float(one) for one in gained]


def sample(server: Server) -> Sample:
    """What the processes hold now."""
    processes = server.processes()
    return Sample(
        time.monotonic(),
        [process.memory_info().rss for process in processes],
        [process.num_threads() for process in processes],
        [process.num_fds() for process in processes],
    )


async def load(server: Server, seconds: float, count: int, seed: int, report: Report) -> None:
    """`count` clients at a time, and one whose answers must never change."""
    address = (server.host, server.port)
    deadline = time.monotonic() + seconds
    kinds, shares = zip(*clients.KINDS.values(), strict=True)
    same = {"model": "tiny", "prompt": "Once", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    texts = set()

    async def many(number: int) -> None:
        draw = random.Random(seed * 1000 + number)
        while time.monotonic() < deadline:
            (kind,) = draw.choices(kinds, shares)
            try:
                report.seen[kind.__name__, await kind(address, draw)] += 1
            except (AssertionError, OSError, ValueError, IndexError) as error:
                report.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    async def steady() -> None:
        while time.monotonic() < deadline:
            began = time.monotonic()
            status, answer = await clients.ask(address, same)
            if status == 200:
                report.delays.append(time.monotonic() - began)
                texts.add(json.loads(answer)["choices"][0]["text"])
            await asyncio.sleep(0.05)

    async def watch() -> None:
        while time.monotonic() < deadline:
            report.samples.append(await asyncio.to_thread(sample, server))
            await asyncio.sleep(min(2.0, seconds / 20))

    await asyncio.gather(watch(), steady(), *(many(number) for number in range(count)))
    if len(texts) != 1:
        report.wrong.append(f"the same request had {len(texts)} answers")


def settle(server: Server, before: Sample, tasks: int) -> list[str]:
    """What is left of the clients, once that changes no more."""
    deadline = time.monotonic() + SETTLED
    while left := _left(server, before, tasks):
        if time.monotonic() > deadline:
            return left
        time.sleep(0.5)
    return []


def _left(server: Server, before: Sample, tasks: int) -> list[str]:
    now = sample(server)
    left = [
        f"{what} of the processes were {old} and are {new}"
        for what, old, new, more in (
            ("threads", before.threads, now.threads, POOL),
            ("files", before.files, now.files, 0),
        )
        if any(a > b + more for a, b in zip(new, old, strict=True))
    ]
    if passing := server.passing():
        left.append(f"processes were started and have not ended: {passing}")
    running = server.tasks()
    if len(running) > tasks:
        left.append(f"there were {tasks} tasks and there are {len(running)}: {Counter(running)}")
    return left


def check_engine(server: Server) -> list[str]:
    """Whether every sequence has given back its place in the queue and its pages."""
    wrong = []
    try:
        # The queue takes exactly this many, and refuses them if a single place was lost.
        server.complete(prompt=["Once"] * (BATCH + QUEUE), max_tokens=2)
    except OSError as error:
        wrong.append(f"places in the queue are lost: {error}")
    records = [record for _ in range(20) for record in json.loads(server.get("/metrics"))]
    last = max(records, key=lambda record: record["iter"])
    cache = last["kvCacheStats"]
    if last["numActiveRequests"] or last["numQueuedRequests"]:
        wrong.append(f"sequences are left: {last}")
    if cache["usedNumBlocks"] or cache["freeNumBlocks"] != cache["maxNumBlocks"]:
        wrong.append(f"pages are left: {cache}")
    return wrong


def soak(server: Server, seconds: float, count: int, seed: int, growth: int) -> Report:
    """Load the server and look at it; `growth` is what a process may grow, in bytes."""
    text = server.complete()
    warm = Report()
    asyncio.run(load(server, min(15.0, seconds / 4), count, seed + 1, warm))  # pools of threads fill, allocators too
    time.sleep(1.0)
    before, tasks = sample(server), len(server.tasks())
    report = Report(wrong=warm.wrong)
    asyncio.run(load(server, seconds, count, seed, report))
    report.wrong += settle(server, before, tasks)
    report.wrong += check_engine(server)
    if server.complete() != text:
        report.wrong.append("the answer after the load is not the answer before it")
    if max(report.growth()) > growth:
        report.wrong.append(f"memory grows: by {report.growth()} bytes")
    lines = server.log.read_text().splitlines()
    report.wrong += [line for line in lines if line and not any(known in line for known in EXPECTED_LINES)]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=24, help="at a time (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        with Server(Path(folder), *OPTIONS) as server:
            report = soak(server, options.seconds, options.clients, options.seed, growth=16 << 20)
        if server.process.returncode:
            report.wrong.append(f"the server ended with exit code {server.process.returncode}")
    print_report(report)
    sys.exit(1 if report.wrong else 0)


def print_report(report: Report) -> None:
    """The figures, then what is wrong."""
    kinds = sorted({kind for kind, _ in report.seen})
    for kind in kinds:
        statuses = {status: count for (of, status), count in sorted(report.seen.items()) if of == kind}
        print(f"{kind:12} {sum(statuses.values()):7}  {statuses}")
    print(f"requests {sum(report.seen.values())}, delays of the steady client: {_shares(report.delays)}")
    for sample in report.samples[:: max(1, len(report.samples) // 20)]:
        print(f"{sample.seconds - report.samples[0].seconds:4.0f} s: MiB {[size >> 20 for size in sample.memory]}")
    print(f"MiB grown: {[round(size / 2**20, 1) for size in report.growth()]}")
    for line in report.wrong[:50]:
        print(f"WRONG {line[:1000]}")
    print(f"{len(report.wrong)} wrong")


def _shares(delays: list[float]) -> str:
    half, most = np.percentile(delays, (50, 99)) if delays else (np.nan, np.nan)
    return f"{half:.3f} s at the median, {most:.3f} s at 99%"


if __name__ == "__main__":
    main()
