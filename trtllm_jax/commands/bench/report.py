"""Reports results: tables, JSON lines, a report file, a plot."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from trtllm_jax.commands.bench.profile import TRACE_LIMIT, Profile
from trtllm_jax.commands.bench.request_results import RequestsResult
from trtllm_jax.commands.bench.results import BatchResult, StartUpResult
from trtllm_jax.commands.bench.serve_results import ServeResult
from trtllm_jax.commands.bench.trace import GROUPS, Program

WIDTH = 120
"""Columns if the output is not a terminal."""

NEGLIGIBLE = 0.01
"""Programs below this fraction of the device's time get no table."""

TOP_KERNELS = 10


class Result(Protocol):
    """Any result of a measurement."""

    def record(self) -> dict[str, Any]:
        """The result as a JSON object."""


def print_json(result: Result) -> None:
    """Print a result as one line of JSON."""
    sys.stdout.write(f"{json.dumps(result.record())}\n")
    sys.stdout.flush()


@contextmanager
def reporting(
    about: Mapping[str, Any],
    json_lines: bool = False,
    report_json: Path | None = None,
    plot_file: Path | None = None,
) -> Iterator[Callable[[Result], None]]:
    """A context that collects results and reports them at its end, also if it is interrupted.

    Args:
        about: the settings of the measurement, for the report file.
        json_lines: print each result as a line of JSON when it arrives, instead of tables.
        report_json: the report file to write.
        plot_file: the PNG file of a plot to draw.
    """
    results: list[Result] = []

    def report(result: Result) -> None:
        results.append(result)
        if json_lines:
            print_json(result)

    try:
        yield report
    finally:
        if results:
            if not json_lines:
                print_results(results)
            if report_json:
                write_report(report_json, about, results)
            if plot_file:
                plot(plot_file, results)


def write_report(path: Path, about: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Write a JSON file of the settings and all results."""
    report = {**about, "results": [result.record() for result in results]}
    path.write_text(json.dumps(report, indent=2, default=str) + "\n")


def print_results(results: Sequence[Result]) -> None:
    """Print tables of all results; all batches share one table, and so do all starts."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    if batches := [result for result in results if isinstance(result, BatchResult)]:
        console.print(batch_table(batches))
    if starts := [result for result in results if isinstance(result, StartUpResult)]:
        console.print(startup_table(starts))
    for result in results:
        if isinstance(result, RequestsResult):
            tables = [throughput_table(result), latency_table(result)] if result.requests else []
            notes = result.notes if isinstance(result, ServeResult) else []
            console.print(_title(result), *tables, *notes, sep="\n", markup=False, soft_wrap=True)
        if isinstance(result, Profile):
            _print_profile(console, result)


def batch_table(results: Sequence[BatchResult]) -> Table:
    """A table with one row for each batch."""
    names = (
        "batch", "in", "out", "1st token ms", "all ms", "decode tok/s", "ms/step", "output tok/s", "total tok/s",
        "prefill tok/s",
    )  # fmt: skip
    table = _table("Fixed batches, medians", *names, text_columns=0)
    for one in results:
        table.add_row(
            str(one.batch),
            str(one.input_len),
            str(one.output_len),
            _number(one.first_token_s * 1e3),
            _number(one.total_s * 1e3),
            _number(one.decode_tokens_per_s),
            _number(one.step_s and one.step_s * 1e3),
            _number(one.output_tokens_per_s),
            _number(one.total_tokens_per_s),
            _number(one.prefill_tokens_per_s),
        )
    if any(one.step_s is None for one in results):
        table.caption = "-: a step is below the noise of the repeats; generate more tokens or repeat more often"
    return table


def throughput_table(result: RequestsResult) -> Table:
    """A table of throughputs under TensorRT-LLM's names."""
    table = _table("Throughput", "what", "figure")
    for name, value in result.throughputs.items():
        table.add_row(name, _number(value))
    return table


def latency_table(result: RequestsResult) -> Table:
    """A table with one row for each distribution of latencies."""
    table = _table("Latency, ms", "what", "avg", "P50", "P90", "P95", "P99", "min", "max")
    for name, values in result.latencies.items():
        if values:
            table.add_row(name, *map(_number, values.record().values()))
    return table


def startup_table(results: Sequence[StartUpResult]) -> Table:
    """A table with one row for each start."""
    table = _table("Start to first token, s", "compilation cache", "import", "load", "compile", "first token", "total")
    for one in results:
        parts = (one.import_s, one.load_s, one.compile_s, one.first_token_s, one.total_s)
        table.add_row(one.cache, *map(_number, parts))
    return table


def group_table(program: Program, device_ms: float, steps: int | None) -> Table:
    """A table with one row for each group of kernels."""
    title = f"{program.name}: {_number(program.total_ms)} ms" + (f", {steps} decode steps" if steps else "")
    table = _table(title, "what", "ms", *(["ms/step"] if steps else []), "% of program", "% of run")
    rows = [(name, program.groups[name]) for name in GROUPS if name in program.groups]
    for name, ms in [*sorted(rows, key=lambda row: -row[1]), ("idle gaps", program.idle_ms)]:
        per_step = [_number(ms / steps)] if steps else []
        shares = (_number(100 * ms / whole if whole else 0.0) for whole in (program.total_ms, device_ms))
        table.add_row(name, _number(ms), *per_step, *shares)
    return table


def kernel_table(program: Program, steps: int | None) -> Table:
    """A table with one row for each kernel, the longest first."""
    table = _table("Top kernels", "kernel", "ms", *(["ms/step"] if steps else []), "runs", "us/run")
    for name, ms, runs in program.top(TOP_KERNELS):
        table.add_row(name, _number(ms), *([_number(ms / steps)] if steps else []), str(runs), _number(1e3 * ms / runs))
    return table


def require_plotting() -> None:
    """ValueError if matplotlib is missing; called before the engine starts."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: install trtllm-jax[bench], or leave --plot out")


def plot(path: Path, results: Sequence[Result]) -> None:
    """Plot output throughput against latency, a line for each workload: latency a token for batches, else a request."""
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[float, float, str]]] = {}
    for one in results:
        if isinstance(one, BatchResult) and one.step_s:
            label = f"{one.input_len} in, {one.output_len} out"
            lines.setdefault(label, []).append((one.step_s * 1e3, one.output_tokens_per_s, str(one.batch)))
        elif isinstance(one, RequestsResult) and (latency := one.latencies["E2E Latency"]):
            rate = one.throughputs["Total Output Throughput (tokens/sec)"]
            lines.setdefault("requests", []).append((latency.avg, rate, one.name))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for label, points in lines.items():
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", label=label)
        for x, y, name in points:
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4))
    requests = "requests" in lines
    axes.set_xlabel("average request latency, ms" if requests else "decode step, ms")
    axes.set_ylabel("output tokens/s")
    axes.set_title(f"Points are named by their {'concurrency or request rate' if requests else 'batch size'}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    if lines:  # empty if every step was below the noise
        axes.legend()
    figure.savefig(path, format="png", dpi=150)


def _print_profile(console: Console, profile: Profile) -> None:
    device_ms = sum(program.total_ms for program in profile.programs)
    console.print(
        f"\nProfile: {_number(profile.seconds * 1e3)} ms, {_number(device_ms)} of them on the device's line; "
        f"trace in {profile.trace}",
        soft_wrap=True,
    )
    if sum(runs for program in profile.programs for _, runs in program.kernels.values()) >= TRACE_LIMIT:
        console.print(
            f"The profiler keeps {TRACE_LIMIT} events, so the end of this run is missing: profile a shorter run."
        )
    for program in profile.programs:
        if program.total_ms >= NEGLIGIBLE * device_ms:
            steps = profile.steps_of(program)
            console.print(group_table(program, device_ms, steps), kernel_table(program, steps), sep="\n")
    table = _table("Host threads, CPU time", "thread", "ms", "% of run")
    for name, seconds in profile.threads.items():
        table.add_row(name, _number(seconds * 1e3), _number(100 * seconds / profile.seconds))
    console.print(table)


def _title(result: RequestsResult) -> str:
    count, inputs, outputs = len(result.requests), result.input_tokens, result.output_tokens
    bound = f", concurrency {result.concurrency}" if result.concurrency else ""
    rate = f", {result.request_rate:g} requests/s" if result.request_rate else ""
    cached = f", {result.cached_prefix} tokens of each prompt cached" if result.cached_prefix else ""
    return f"\n{count} requests, {inputs} prompt tokens, {outputs} output tokens{bound}{rate}{cached}"


def _table(title: str, *columns: str, text_columns: int = 1) -> Table:
    """A table whose first columns hold text and whose others hold numbers."""
    table = Table(title=title, title_justify="left", show_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < text_columns else "right", overflow="fold")
    return table


def _number(value: float | None) -> str:
    """A number with four significant digits, but at least all digits of its integer part; "-" for None."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f}"
