"""The command line of `trtllm-bench serve`: load on any OpenAI-compatible server."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import click

from trtllm_jax.commands.click_options import (
    EXISTING_FILE,
    LOG_LEVELS,
    OUTPUT_FILE,
    POSITIVE,
    Bounds,
    SectionedCommand,
    bounds,
    nearest,
    option,
    refuse_others,
    set_log_level,
)
from trtllm_jax.commands.user_errors import readable_errors

OBJECTIVES = ("ttft", "tpot", "e2el")
"""The latencies that `--goodput` may bound: time to first token, time per output token, end-to-end latency."""

HELP = """Send streamed requests to an OpenAI-compatible server and report throughput, latencies and failures.

\b
trtllm-bench serve --concurrency 1,8,64 --plot sweep.png
trtllm-bench serve --request_rate 2,4,8 --goodput ttft:500 tpot:50
trtllm-bench serve --endpoint chat --dataset preprocessed_dataset.json

Several rates or bounds are measured one after the other. The exit code is 1 if any request failed.
"""
Rates = tuple[float | None, ...]
"""Requests/s, one measurement each; None for all at once."""


def rates(ctx: click.Context, param: click.Parameter, value: str) -> Rates:
    """The callback of an option that takes a comma-separated list of positive numbers or inf."""
    try:
        numbers = [float(word) for word in value.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(number > 0 for number in numbers):
        raise click.BadParameter(f"{value!r} is not a list of positive numbers: write for example 2,4,inf", ctx, param)
    return tuple(None if math.isinf(number) else number for number in numbers)


def objectives(words: Sequence[str]) -> dict[str, float]:
    """Milliseconds by name, from words such as ttft:500; UsageError names an invalid one."""
    found: dict[str, float] = {}
    for word in words:
        name, _, number = word.partition(":")
        try:
            most = float(number)
        except ValueError:
            most = math.nan
        if name not in OBJECTIVES or not most > 0:
            raise click.UsageError(
                f"--goodput got {word!r}: write {', '.join(OBJECTIVES)} with milliseconds, as in ttft:500 tpot:50"
            )
        found[name] = most
    return found


def extra_fields(ctx: click.Context, param: click.Parameter, value: str) -> dict[str, Any]:
    """The callback of an option that takes a JSON object."""
    try:
        fields = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not JSON: {error}", ctx, param) from error
    if not isinstance(fields, dict):
        raise click.BadParameter(f'{value!r} is not an object: write for example {{"temperature": 0}}', ctx, param)
    if not fields.get("stream", True):
        raise click.BadParameter("answers are measured as streams: leave stream out", ctx, param)
    return fields


def _server(name: str, **attributes: Any) -> Callable[[Any], Any]:
    return option(name, section="Server", **attributes)


def _measuring(name: str, **attributes: Any) -> Callable[[Any], Any]:
    return option(name, section="Measuring", **attributes)


def _report(name: str, **attributes: Any) -> Callable[[Any], Any]:
    return option(name, section="Report", **attributes)


@click.command(cls=SectionedCommand, help=HELP)
@_server("--base_url", default="http://localhost:8000/v1", help="URL of the server's API.")
@_server("--model -m", help="As the server names it  [the first of its /models]")
@_server("--api_key", envvar="OPENAI_API_KEY", help="Bearer token; also taken from OPENAI_API_KEY.")
@_server("--endpoint", type=click.Choice(["completions", "chat"]), default="completions", help="The endpoint to call.")
@_server(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=600.0, help="Seconds after which a request fails."
)
@option(
    "--num_requests",
    type=click.IntRange(min=0),
    help="Requests of each measurement; 0: all of the dataset  [100, or all]",
)
@option("--input_len", type=POSITIVE, default=512, help="Tokens of each random prompt.")
@option("--output_len", type=POSITIVE, default=128, help="Tokens generated for each, at most.")
@option("--vocab_size", type=POSITIVE, default=10_000, help="Random ids are below it, unless a tokenizer is given.")
@option("--tokenizer", help="Turns random prompts into text, for chat: folder, .gguf file or hub name.")
@option("--dataset", type=EXISTING_FILE, help="JSON lines as prepare-dataset writes them, in place of random prompts.")
@option("--ignore_eos", is_flag=True, help="Request answers of full length; not all servers support this field.")
@option("--extra_body", default="{}", callback=extra_fields, metavar="JSON", help="Fields of the body; null omits one.")
@option("--request_rate", default="inf", callback=rates, metavar="R[,R...]", help="Poisson arrivals, requests/s.")
@option("--concurrency", default="-1", callback=bounds, metavar="N[,N...]", help="Requests in flight; -1: no bound.")
@option("--seed", type=click.IntRange(min=0), default=420, help="Seed of prompts and arrivals.")
@_measuring("--warmup", type=click.IntRange(min=0), default=1, help="Unmeasured requests, all of which must succeed.")
@_measuring(
    "--goodput", multiple=True, metavar="NAME:MS...", help="Count answers within ttft, tpot and e2el, milliseconds."
)
@_measuring("--client_processes", type=POSITIVE, default=1, help="Processes that send requests, if one is too slow.")
@_report("--report_json", type=OUTPUT_FILE, help="Write all results to this file.")
@_report("--json_lines", is_flag=True, help="Print one JSON line a result, no table.")
@_report("--plot", type=OUTPUT_FILE, help="Draw throughput against latency into this PNG file.")
@_report("--log_level", type=click.Choice(LOG_LEVELS, case_sensitive=False), help="How much is logged.")
@click.argument("more", nargs=-1, metavar="")
@click.pass_context
def serve(
    ctx: click.Context,
    /,
    request_rate: Rates,
    concurrency: Bounds,
    goodput: tuple[str, ...],
    more: tuple[str, ...],
    num_requests: int | None,
    **options: Any,
) -> None:
    """Measure a server at each request rate and concurrency."""
    refuse_others(ctx)
    if more and not goodput:
        raise click.UsageError(f"Got unexpected extra argument ({more[0]}): only --goodput takes several words", ctx)
    limits = objectives([word for words in (*goodput, *more) for word in words.replace(",", " ").split()])
    values = options | {name: nearest(ctx, name) for name in options.keys() & ctx.find_root().params.keys()}
    values["warmup"] = options["warmup"] if values["warmup"] is None else values["warmup"]
    if level := values.pop("log_level"):
        set_log_level(level)
    with readable_errors():
        from trtllm_jax.commands.bench.serve_run import Settings, measure_server

        count = None if num_requests == 0 else num_requests
        measure_server(Settings(num_requests=count, objectives=limits, **values), request_rate, concurrency)
