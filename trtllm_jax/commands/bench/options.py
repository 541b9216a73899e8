"""The options that all commands of `trtllm-bench` share, given before or after the command's name."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from trtllm_jax.commands.click_options import (
    BACKENDS,
    EXISTING_FILE,
    LOG_LEVELS,
    OUTPUT_FILE,
    POSITIVE,
    Command,
    nearest,
    option,
    set_log_level,
)
from trtllm_jax.commands.yaml_file import read_yaml

PROFILE_FOLDER = "trtllm_jax_profile"

_COMMON = (
    option("--model -m", section="Model", help="Folder, .gguf file or hub name."),
    option("--model_path", section="Model", help="Path of the model, if --model is only its name."),
    option("--tokenizer", section="Model", help="Tokenizer for a dataset of texts; the model's own by default."),
    option(
        "--backend", section="Model", type=click.Choice(BACKENDS), help="Accepted; JAX is always used."
    ),
    option("--tp --tp_size", section="Model", type=POSITIVE, help="Devices that share the model."),
    option(
        "--dtype", section="Model", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), help="Of weights."
    ),
    option(
        "--load_format", section="Model", type=click.Choice(["auto", "dummy"]), help="dummy: random weights, no files."
    ),
    option("--max_batch_size", section="Engine", type=POSITIVE, help="Sequences at once  [from the workload]"),
    option("--max_num_tokens", section="Engine", type=POSITIVE, help="Tokens a step  [the engine's default]"),
    option("--max_seq_len", section="Engine", type=POSITIVE, help="Prompt and answer  [from the workload]"),
    option(
        "--kv_cache_free_gpu_mem_fraction", section="Engine", type=click.FloatRange(0, 1, min_open=True),
        help="Part of the free memory that the KV cache takes.",
    ),
    option("--kv_cache_max_tokens", section="Engine", type=POSITIVE, help="Tokens that the KV cache holds."),
    option(
        "--config --extra_llm_api_options", section="Engine", type=EXISTING_FILE,
        help="YAML file of LLM(...) arguments; command-line options override it.",
    ),
    option("--temperature", section="Sampling", type=click.FloatRange(min=0), help="Greedy if none of these is given."),
    option("--top_p", section="Sampling", type=click.FloatRange(0, 1), help="Probability mass to keep."),
    option("--top_k", section="Sampling", type=click.IntRange(min=0), help="Tokens to keep; 0: all."),
    option(
        "--seed", section="Sampling", type=click.IntRange(min=0), default=420,
        help="Seed of prompts, arrivals and samples.",
    ),
    option("--warmup", section="Measuring", type=click.IntRange(min=0), help="Unmeasured runs (1) or requests (2)."),
    option("--repeats", section="Measuring", type=POSITIVE, default=3, help="Runs of a fixed batch; shows the median."),
    option(
        "--profile", section="Measuring", is_flag=False, flag_value=PROFILE_FOLDER, metavar="[DIR]",
        help=f"Run once more, keep the trace in DIR ({PROFILE_FOLDER}) and print where the time goes.",
    ),
    option("--report_json", section="Report", type=OUTPUT_FILE, help="Write all results to this file."),
    option("--json_lines", section="Report", is_flag=True, help="Print one JSON line a result, no table."),
    option("--plot", section="Report", type=OUTPUT_FILE, help="Draw throughput against latency into this PNG file."),
    option(
        "--log_level", section="Report", type=click.Choice(LOG_LEVELS, case_sensitive=False), help="How much is logged."
    ),
)  # fmt: skip


def common_options(command: Command) -> Command:
    """Add every option of `Common` to `command`."""
    for add in reversed(_COMMON):
        command = add(command)
    return command


@dataclass(frozen=True)
class Common:
    """The values of the options in `_COMMON`, by name."""

    model: str
    model_path: str | None
    tokenizer: str | None
    backend: str | None
    tp: int | None
    dtype: str | None
    load_format: str | None
    max_batch_size: int | None
    max_num_tokens: int | None
    max_seq_len: int | None
    kv_cache_free_gpu_mem_fraction: float | None
    kv_cache_max_tokens: int | None
    config: Path | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int
    warmup: int | None
    repeats: int
    profile: str | None
    report_json: Path | None
    json_lines: bool
    plot: Path | None
    log_level: str | None

    @classmethod
    def of(cls, ctx: click.Context) -> "Common":
        """The options given after the command's name, else before it, else the defaults; sets the log level."""
        values = {field.name: nearest(ctx, field.name) for field in fields(cls)}
        if not values["model"]:
            raise click.UsageError("Missing option '--model' / '-m': a folder, a .gguf file or a hub name.", ctx)
        if values["profile"] in ("throughput", "latency", "startup"):
            command = values["profile"]
            raise click.UsageError(f"--profile took {command!r} for its folder: write --profile=DIR {command}", ctx)
        common = cls(**values)
        if common.log_level:
            set_log_level(common.log_level)
        return common

    @property
    def location(self) -> str:
        """The path or name of the model to load."""
        return self.model_path or self.model

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments of `SamplingParams` besides lengths; empty for greedy decoding."""
        options = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given = {name: value for name, value in options.items() if value is not None}
        return given | {"seed": self.seed} if given else {}

    def llm_arguments(self, *, batch: int | None, length: int, reuse: bool = False) -> dict[str, Any]:
        """The arguments of `LLM(...)`: from options, else from the --config file, else from the workload.

        Args:
            batch: max_batch_size if it is not given; None leaves it to the engine.
            length: tokens of the workload's longest sequence.
            reuse: whether the prefix cache is on.

        Raises:
            click.UsageError: the file is not a mapping, or a size is too small for the workload.
        """
        options = {
            "tensor_parallel_size": self.tp,
            "dtype": self.dtype,
            "load_format": self.load_format,
            "max_batch_size": self.max_batch_size,
            "max_num_tokens": self.max_num_tokens,
            "max_seq_len": self.max_seq_len,
        }
        cache = {
            "free_gpu_memory_fraction": self.kv_cache_free_gpu_mem_fraction,
            "max_tokens": self.kv_cache_max_tokens,
        }
        from_file = self._file()
        derived = {"max_batch_size": batch, "max_seq_len": length, "skip_tokenizer_init": True}
        arguments = _given(derived) | from_file | _given(options) | {"model": self.location}
        in_file = from_file.get("kv_cache_config") or {}
        arguments["kv_cache_config"] = {"enable_block_reuse": reuse} | in_file | _given(cache)
        _check(arguments, length, reuse)
        return arguments

    def _file(self) -> dict[str, Any]:
        content = read_yaml(self.config)
        for name in ("max_batch_size", "max_seq_len"):
            value = content.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise click.UsageError(f"--config = {self.config}: {name} = {value!r} is not an integer")
        return content


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _check(arguments: Mapping[str, Any], length: int, reuse: bool) -> None:
    limit = arguments["max_seq_len"]
    if limit is not None and limit < length:
        raise click.UsageError(
            f"max_seq_len = {limit} is too small: a request of this workload has {length} tokens, prompt and "
            f"answer. Raise it to {length}, leave it out, or shorten the prompts or answers"
        )
    if reuse and not arguments["kv_cache_config"]["enable_block_reuse"]:
        raise click.UsageError(
            "--cached_prefix needs block reuse, and --config has kv_cache_config.enable_block_reuse = false: "
            "leave one of them out"
        )
