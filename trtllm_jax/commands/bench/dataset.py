"""The command line of `trtllm-bench prepare-dataset`, with TensorRT-LLM's options."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from trtllm_jax.commands.click_options import EXISTING_FILE, LOG_LEVELS, OUTPUT_FILE, POSITIVE, nearest, set_log_level
from trtllm_jax.commands.user_errors import readable_errors

HELP = """Write a dataset for the --dataset option of the other commands: JSON lines of prompts and output lengths.

\b
trtllm-bench -m M prepare-dataset token-unif-dist --num-requests 500 --input-min 100 --input-max 900 ...
trtllm-bench -m M prepare-dataset --output chats.json real-dataset --dataset-name conversations.jsonl

Random prompts are written as token ids, prompts of a real dataset as texts.
"""
_UNSUPPORTED = {
    "task_id": "-1",
    "rand_task_id": "None",
    "lora_dir": "None",
}
"""Options of LoRA adapters, with the only supported value of each."""


@dataclass(frozen=True)
class Target:
    """The options before the name of the kind of dataset: the model and the output file."""

    location: str | None
    tokenizer: str | None
    output: Path
    seed: int

    @classmethod
    def of(cls, ctx: click.Context) -> "Target":
        """The options; UsageError if no model is given, or an adapter is."""
        for name, supported in _UNSUPPORTED.items():
            if str(value := nearest(ctx, name)) != supported:
                raise click.UsageError(
                    f"--{name} = {value} is not available in this release, which has no adapters: leave it out", ctx
                )
        location, tokenizer = nearest(ctx, "model_path") or nearest(ctx, "model"), nearest(ctx, "tokenizer")
        if not location and not tokenizer:
            raise click.UsageError("Missing option '--model' / '-m' or '--tokenizer', which gives the token ids.", ctx)
        if level := nearest(ctx, "log_level"):
            set_log_level(level)
        return cls(location, tokenizer, nearest(ctx, "output"), nearest(ctx, "random_seed"))


@click.group("prepare-dataset", help=HELP)
@click.option("--model", "-m", help="Folder, .gguf file or hub name; also before prepare-dataset.")
@click.option("--model_path", help="Path of the model, if --model is only its name.")
@click.option("--tokenizer", help="Another tokenizer than the model's: folder, .gguf file or hub name.")
@click.option("--output", type=OUTPUT_FILE, default="preprocessed_dataset.json", help="The file to write.")
@click.option("--random_seed", type=click.IntRange(min=0), default=420, help="Seed of lengths and ids.")
@click.option("--task_id", type=int, default=-1, help="LoRA adapter; this release supports only -1, for none.")
@click.option("--rand_task_id", type=int, nargs=2, help="LoRA adapters; not available in this release.")
@click.option("--lora_dir", help="LoRA adapters; not available in this release.")
@click.option("--trust_remote_code", is_flag=True, help="Accepted, but a model's code is never run.")
@click.option("--log_level", type=click.Choice(LOG_LEVELS, case_sensitive=False), help="How much is logged.")
def prepare_dataset(**_: Any) -> None:
    """Do nothing: the subcommands write the dataset."""


def _required(name: str, least: int, what: str) -> Callable[[Any], Any]:
    return click.option(name, type=click.IntRange(min=least), required=True, help=what)


@prepare_dataset.command("token-norm-dist")
@_required("--num_requests", 1, "How many prompts.")
@_required("--input_mean", 1, "Tokens of a prompt.")
@_required("--input_stdev", 0, "Their standard deviation.")
@_required("--output_mean", 1, "Tokens generated for each.")
@_required("--output_stdev", 0, "Their standard deviation.")
@click.pass_context
def token_norm_dist(
    ctx: click.Context,
    /,
    num_requests: int,
    input_mean: int,
    input_stdev: int,
    output_mean: int,
    output_stdev: int,
) -> None:
    """Random prompts with normally distributed lengths of at least 1."""
    with readable_errors():
        from trtllm_jax.commands.bench.prompts import normal, random_lines

        lengths = (normal(input_mean, input_stdev), normal(output_mean, output_stdev))
        target = Target.of(ctx)
        _write(target, random_lines(num_requests, *lengths, **_source(target)))


@prepare_dataset.command("token-unif-dist")
@_required("--num_requests", 1, "How many prompts.")
@_required("--input_min", 1, "Tokens of the shortest prompt.")
@_required("--input_max", 1, "Tokens of the longest prompt.")
@_required("--output_min", 1, "Tokens generated at least.")
@_required("--output_max", 1, "Tokens generated at most.")
@click.pass_context
def token_unif_dist(
    ctx: click.Context, /, num_requests: int, input_min: int, input_max: int, output_min: int, output_max: int
) -> None:
    """Random prompts with lengths distributed uniformly between two bounds, both included."""
    for name, least, most in (("input", input_min, input_max), ("output", output_min, output_max)):
        if least > most:
            raise click.UsageError(f"--{name}_min = {least} is above --{name}_max = {most}: exchange them", ctx)
    with readable_errors():
        from trtllm_jax.commands.bench.prompts import random_lines, uniform

        lengths = (uniform(input_min, input_max), uniform(output_min, output_max))
        target = Target.of(ctx)
        _write(target, random_lines(num_requests, *lengths, **_source(target)))


def _mean_and_deviation(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    words = [word.strip() for word in value.split(",")]
    if len(words) != 2 or not all(map(str.isdecimal, words)) or not int(words[0]):
        raise click.BadParameter(
            f"{value!r} is not a mean and a standard deviation: write for example 128,10", ctx, param
        )
    return int(words[0]), int(words[1])


@prepare_dataset.command("real-dataset")
@click.option(
    "--dataset_name", type=EXISTING_FILE, required=True, help="JSON (a list) or JSON lines of objects, on this machine."
)
@click.option("--dataset_input_key", help='Field of the prompt  ["prompt", or the first turn of "conversations"]')
@click.option("--dataset_prompt_key", help="Field of a text that goes before the prompt.")
@click.option("--dataset_prompt", help="Text that goes before every prompt.")
@click.option("--dataset_output_key", help='Field of the answer, whose tokens are counted  [of "conversations"]')
@click.option(
    "--output_len_dist",
    callback=_mean_and_deviation,
    metavar="MEAN,STDEV",
    help="Output lengths, in place of the answers'.",
)
@click.option("--num_requests", type=POSITIVE, help="The most prompts to write.")
@click.option("--max_input_len", type=POSITIVE, help="Prompts of more tokens are left out.")
@click.pass_context
def real_dataset(ctx: click.Context, /, dataset_name: Path, **options: Any) -> None:
    """Prompts of a file, without entries that lack a prompt or an answer."""
    if options["dataset_prompt"] and options["dataset_prompt_key"]:
        raise click.UsageError("--dataset_prompt and --dataset_prompt_key exclude each other: leave one out", ctx)
    with readable_errors():
        from trtllm_jax.commands.bench.prompts import Fields, real_lines

        target = Target.of(ctx)
        fields = Fields(
            *(options.pop(f"dataset_{name}") for name in ("input_key", "output_key", "prompt_key", "prompt"))
        )
        _write(target, real_lines(dataset_name, fields, encode=_encoder(target), seed=target.seed, **options))


def _source(target: Target) -> dict[str, Any]:
    from trtllm_jax.commands.bench.model import ModelFacts

    if target.location:
        facts = ModelFacts(target.location, weights=False)
        return {"vocab": facts.vocab, "require_length": facts.require_length, "seed": target.seed}
    return {"vocab": len(_tokenizer(target)), "seed": target.seed}


def _encoder(target: Target) -> Callable[[str], list[int]]:
    encode: Callable[[str], list[int]] = _tokenizer(target).encode
    return encode


def _tokenizer(target: Target) -> Any:
    from checkpoints.checkpoint import open_checkpoint

    return open_checkpoint(str(target.tokenizer or target.location), weights=False).load_tokenizer()


def _write(target: Target, lines: Iterable[str]) -> None:
    written = list(lines)
    target.output.write_text("".join(f"{line}\n" for line in written), encoding="utf-8")
    click.echo(f"{target.output}: {len(written)} requests")
