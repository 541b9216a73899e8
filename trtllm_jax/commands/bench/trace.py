"""Breaks down a profiled run's time: reads jax.profiler's trace.json.gz, using only gzip and json."""

import gzip
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

GROUPS = ("matmul", "attention", "sampling", "norm/elementwise", "copies", "communication", "other")
UNNAMED = "(no program)"

# The first match decides. A named scope takes precedence over the kernel's name, because attention in plain XLA also
# consists of products, copies and reductions; but transfers and collectives are grouped by name in any scope.
_NAME_FIRST = (
    ("communication", r"nccl|all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|collective|permute|sendrecv"),
    ("copies", r"^memcpy|^memset"),
)
_SCOPES = (("attention", "attention"), ("sample", "sampling"))
_NAME_THEN = (
    ("attention", r"attention|flash|fmha|combine_splits|write_keys"),
    (
        "matmul",
        r"gemm|gemv|nvjet|cublas|cutlass|xmma|matmul|linear|(^|_)dot|dot_general|ynn_fusion|onednn|conv_general",
    ),
    ("sampling", r"sort|top_?k|argmax|rng|threefry|sample|sampling"),
    ("copies", r"^(wrapped_)?(copy|transpose)([._]|$)|transpose_copy|copy_fusion|copy_bitcast"),
    (
        "norm/elementwise",
        r"fusion|wrapped_|reduce|norm|broadcast|convert|select|gather|scatter|slice|concatenate|iota|pad|add|multiply",
    ),
)
_PASSED_THROUGH = re.compile(
    r"(p?jit|jvp|vmap|shard_map|closed_call|while|body|cond|branch_\d+_fun|layer_\d+)(\(.*\))?"
)


class Kernel(NamedTuple):
    """One run of one device operation; times in microseconds, `self_us` without nested operations."""

    name: str
    scope: str
    program: str
    start: float
    end: float
    self_us: float


@dataclass
class Program:
    """One compiled program's share of a run, in milliseconds on the device.

    Attributes:
        name: of its HLO module.
        groups: the time of each of GROUPS that occurs.
        kernels: the time and number of runs of each kernel; names that differ only in a number are merged.
        idle_ms: gaps before its kernels in which no kernel ran.
    """

    name: str
    groups: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    kernels: dict[str, tuple[float, int]] = field(default_factory=lambda: defaultdict(lambda: (0.0, 0)))
    idle_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        """The time of kernels and idle gaps."""
        return sum(self.groups.values()) + self.idle_ms

    def top(self, count: int) -> list[tuple[str, float, int]]:
        """The `count` kernels that took most: name, milliseconds, runs."""
        ordered = sorted(self.kernels.items(), key=lambda one: -one[1][0])
        return [(name, ms, runs) for name, (ms, runs) in ordered[:count]]


def newest_trace(folder: Path) -> Path:
    """The newest trace file under `folder`; ValueError if there is none."""
    found = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"profile folder {folder} holds no trace.json.gz: the profiler wrote nothing")
    return found[-1]


def read_programs(path: Path) -> list[Program]:
    """The programs that ran on the first device of a trace, the longest first."""
    return programs(read_kernels(path))


def read_kernels(path: Path) -> list[Kernel]:
    """The operations of the first device of a trace, in the order in which they started."""
    with gzip.open(path, "rt") as file:
        return kernels(json.load(file)["traceEvents"])


def programs(ran: Iterable[Kernel]) -> list[Program]:
    """The programs of kernels, which are ordered by their start; the longest program first."""
    found: dict[str, Program] = {}
    busy_until: float | None = None
    for kernel in ran:
        program = found.setdefault(kernel.program, Program(kernel.program))
        ms = kernel.self_us / 1e3
        program.groups[group_of(kernel.name, kernel.scope)] += ms
        name = _readable(kernel)
        before, runs = program.kernels[name]
        program.kernels[name] = (before + ms, runs + 1)
        if busy_until is not None:
            program.idle_ms += max(0.0, kernel.start - busy_until) / 1e3
        busy_until = max(kernel.end, busy_until or kernel.end)
    return sorted(found.values(), key=lambda one: -one.total_ms)


def kernels(events: Iterable[Mapping[str, Any]]) -> list[Kernel]:
    """The kernels in a trace's events, as for `read_kernels`.

    In a trace a GPU is a process "/device:GPU:0" whose threads "Stream #..." have its kernels. A CPU has no such
    process: its operations are the events of any thread with an hlo_op, and a loop's event contains those of its body.
    """
    events = list(events)
    names = {
        (event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name")
    }
    devices = {name: pid for (pid, tid), name in names.items() if tid is None and name.startswith("/device:GPU")}
    device = devices[min(devices)] if devices else None

    def on_device(event: Mapping[str, Any]) -> bool:
        if device is None:
            return "hlo_op" in event.get("args", {})
        return event["pid"] == device and names.get((device, event["tid"]), "").startswith("Stream")

    threads = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and on_device(event):
            threads[event["pid"], event["tid"]].append(event)
    found = itertools.chain.from_iterable(map(_with_self_time, threads.values()))
    return sorted(found, key=lambda one: one.start)


def _with_self_time(events: list[Mapping[str, Any]]) -> Iterator[Kernel]:
    """One thread's kernels, with the time of nested kernels subtracted."""
    ordered = sorted(events, key=lambda event: (event["ts"], -event.get("dur", 0)))
    own = [float(event.get("dur", 0)) for event in ordered]
    open_events: list[int] = []
    for index, event in enumerate(ordered):
        while open_events and _end(ordered[open_events[-1]]) <= event["ts"]:
            open_events.pop()
        if open_events:
            own[open_events[-1]] -= own[index]
        open_events.append(index)
    for event, self_us in zip(ordered, own, strict=True):
        args = event.get("args", {})
        # Depending on its version, the profiler has the operation's path of scopes under one of these names.
        scope = next((args[key] for key in ("tf_op", "name", "long_name") if "/" in args.get(key, "")), "")
        program = args.get("hlo_module", UNNAMED)
        yield Kernel(event["name"], scope, program, event["ts"], _end(event), max(0.0, self_us))


def _end(event: Mapping[str, Any]) -> float:
    return float(event["ts"] + event.get("dur", 0))


def group_of(name: str, scope: str) -> str:
    """The group of GROUPS that a kernel belongs to, by its name and its path of named scopes."""
    lower = name.lower()
    for group, pattern in _NAME_FIRST:
        if re.search(pattern, lower):
            return group
    parts = scope.split("/")
    for part, group in _SCOPES:
        if part in parts:
            return group
    for text in (lower, parts[-1]):
        for group, pattern in _NAME_THEN:
            if group != "norm/elementwise" and re.search(pattern, text):
                return group
    elementwise = dict(_NAME_THEN)["norm/elementwise"]
    return "norm/elementwise" if re.search(elementwise, lower) else "other"


def _readable(kernel: Kernel) -> str:
    """The kernel's name without its number, and the innermost scopes, which locate it in a layer."""
    name = re.sub(r"([._]\d+)+$", "", kernel.name)
    parts = [part for part in kernel.scope.split("/") if not _PASSED_THROUGH.fullmatch(part)]
    return f"{name} ({'/'.join(parts[-2:])})" if any(parts) else name
