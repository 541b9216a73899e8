"""The command line of `trtllm-bench`. Heavy packages are imported only after the options are read."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from trtllm_jax.commands.bench.dataset import prepare_dataset
from trtllm_jax.commands.bench.options import Common, common_options
from trtllm_jax.commands.bench.serve import serve
from trtllm_jax.commands.click_options import (
    EXISTING_FILE,
    POSITIVE,
    SETTINGS,
    Bounds,
    SectionedGroup,
    bounds,
    option,
    positive_ints,
)
from trtllm_jax.commands.user_errors import readable_errors

# Click rewraps paragraphs, except those that begin with a backspace.
HELP = """Measure how fast a model generates.

\b
trtllm-bench --model M --batch_size 1,8,32 --input_len 128 --output_len 128
trtllm-bench --model M throughput --num_requests 500 --concurrency 64
trtllm-bench --model M latency --target_input_len 1024
trtllm-bench --model M startup
trtllm-bench serve --base_url http://localhost:8000/v1 --request_rate 1,4,16
trtllm-bench --model M prepare-dataset token-norm-dist --help

Without a command it measures fixed batches: every combination of the three lists, in one engine. Prompts are random
token ids, decoding is greedy, end-of-sequence ids are ignored and prefixes are not reused.

Options are written with _ or with -. All except the workload's may also be given after a command.
"""
BATCH_OPTIONS = ("batch_size", "input_len", "output_len")
DATASET = option("--dataset", type=EXISTING_FILE, help="JSON lines as TensorRT-LLM's prepare-dataset writes them.")
PROMPT_LENGTH = option("--target_input_len", type=POSITIVE, default=512, help="Tokens of each random prompt.")


@click.group(cls=SectionedGroup, invoke_without_command=True, context_settings=SETTINGS, help=HELP)
@option("--batch_size", default="1", callback=positive_ints, metavar="N[,N...]", help="Prompts that run together.")
@option("--input_len", default="128", callback=positive_ints, metavar="N[,N...]", help="Tokens of each prompt.")
@option("--output_len", default="128", callback=positive_ints, metavar="N[,N...]", help="Tokens generated for each.")
@common_options
@click.pass_context
def main(
    ctx: click.Context,
    /,
    batch_size: tuple[int, ...],
    input_len: tuple[int, ...],
    output_len: tuple[int, ...],
    **_: Any,
) -> None:
    """Measure fixed batches; with a command, refuse the options of fixed batches."""
    if ctx.invoked_subcommand is None:
        with readable_errors():
            common = Common.of(ctx)
            from trtllm_jax.commands.bench.run import fixed_batches

            fixed_batches(common, batch_size, input_len, output_len)
        return
    for name in BATCH_OPTIONS:
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} is for fixed batches: leave it or {ctx.invoked_subcommand!r} out", ctx)


@main.command()
@DATASET
@option("--num_requests", type=click.IntRange(min=0), help="Requests; 0: all of the dataset  [500, or all]")
@PROMPT_LENGTH
@option("--target_output_len", type=POSITIVE, default=256, help="Tokens generated for each.")
@option("--concurrency", default="-1", callback=bounds, metavar="N[,N...]", help="Requests in flight; -1: no bound.")
@option("--request_rate", type=click.FloatRange(min=0, min_open=True), help="Poisson arrivals, requests/s.")
@common_options
@click.pass_context
def throughput(
    ctx: click.Context,
    /,
    dataset: Path | None,
    num_requests: int | None,
    target_input_len: int,
    target_output_len: int,
    concurrency: Bounds,
    request_rate: float | None,
    **_: Any,
) -> None:
    """Send many requests at once, streamed, and report throughput and latencies."""
    with readable_errors():
        common = Common.of(ctx)
        from trtllm_jax.commands.bench.run import Workload, requests

        workload = Workload(dataset, num_requests, 500, target_input_len, target_output_len)
        requests(common, workload, concurrency, request_rate)


@main.command()
@DATASET
@option("--num_requests", type=click.IntRange(min=0), help="Requests; 0: all of the dataset  [10, or all]")
@PROMPT_LENGTH
@option("--target_output_len", type=POSITIVE, default=128, help="Tokens generated for each.")
@option("--cached_prefix", type=click.IntRange(min=0), default=0, help="Tokens of each prompt that are cached already.")
@common_options
@click.pass_context
def latency(
    ctx: click.Context,
    /,
    dataset: Path | None,
    num_requests: int | None,
    target_input_len: int,
    target_output_len: int,
    cached_prefix: int,
    **_: Any,
) -> None:
    """Send requests one at a time and report latencies."""
    with readable_errors():
        common = Common.of(ctx)
        if cached_prefix and (dataset or common.warmup == 0):
            raise click.UsageError(
                "--cached_prefix needs random prompts and warm-up requests, which fill the cache: leave --dataset and "
                "--warmup 0 out",
                ctx,
            )
        from trtllm_jax.commands.bench.run import Workload, requests

        workload = Workload(dataset, num_requests, 10, target_input_len, target_output_len, cached_prefix)
        requests(common, workload, (1,), None)


@main.command()
@option("--target_input_len", type=POSITIVE, default=128, help="Tokens of the first prompt.")
@common_options
@click.pass_context
def startup(ctx: click.Context, /, target_input_len: int, **_: Any) -> None:
    """Time a fresh process up to its first token, with an empty and then with a filled compilation cache."""
    with readable_errors():
        common = Common.of(ctx)
        if common.profile or common.plot:
            raise click.UsageError("startup has nothing to profile or plot: leave --profile and --plot out", ctx)
        from trtllm_jax.commands.bench.run import startup_times

        startup_times(common, target_input_len)


main.add_command(serve)
main.add_command(prepare_dataset)

if __name__ == "__main__":
    main()
