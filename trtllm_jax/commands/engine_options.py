"""TensorRT-LLM's engine options, for commands other than `trtllm-bench`, and their mapping to arguments of `LLM`."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import click

from trtllm_jax.commands.click_options import BACKENDS, EXISTING_FILE, LOG_LEVELS, POSITIVE, option

Command = TypeVar("Command", bound=Callable[..., Any])

FRACTION = click.FloatRange(0, 1, min_open=True)
ONE = click.IntRange(1, 1)

_OPTIONS = (
    option("--tokenizer", section="Model", help="Folder, .gguf file or hub name  [the model's own]"),
    option("--revision --hf_revision", section="Model", help="Of a hub name."),
    option(
        "--dtype", section="Model", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), help="Of weights."
    ),
    option(
        "--load_format", section="Model", type=click.Choice(["auto", "dummy"]), help="dummy: random weights, no files."
    ),
    option(
        "--trust_remote_code",
        section="Model",
        is_flag=True,
        default=None,
        help="Accepted, but a model's code is never run.",
    ),
    option(
        "--backend",
        section="Model",
        type=click.Choice(BACKENDS),
        help="Accepted; JAX is always used.",
    ),
    option(
        "--tensor_parallel_size --tp_size", section="Engine", type=POSITIVE, help="Devices that share the model  [1]"
    ),
    option("--pipeline_parallel_size --pp_size", section="Engine", type=POSITIVE, help="1 in this release."),
    option("--moe_expert_parallel_size --ep_size", section="Engine", type=POSITIVE, help="1 in this release."),
    option("--gpus_per_node", section="Engine", type=POSITIVE, help="Accepted for compatibility."),
    option("--max_beam_width", section="Engine", type=POSITIVE, help="1 in this release."),
    option("--max_batch_size", section="Engine", type=POSITIVE, help="Sequences at once  [what the device can hold]"),
    option("--max_num_tokens", section="Engine", type=POSITIVE, help="Tokens a step  [what suits the device]"),
    option("--max_seq_len", section="Engine", type=POSITIVE, help="Prompt and answer  [the model's]"),
    option(
        "--kv_cache_free_gpu_memory_fraction --free_gpu_memory_fraction",
        section="Engine",
        type=FRACTION,
        help="Part of the free memory that the KV cache takes  [0.9]",
    ),
    option("--kv_cache_dtype", section="Engine", help="Of the KV cache  [the weights']"),
    option("--enable_chunked_prefill", section="Engine", is_flag=True, default=None, help="Accepted; always on."),
    option(
        "--config --extra_llm_api_options",
        section="Engine",
        type=EXISTING_FILE,
        help="YAML file of this command's options and of LLM(...) arguments; command-line options override it.",
    ),
)

NOT_FOR_LLM = {"config", "log_level"}
CACHE_FIELDS = {"kv_cache_free_gpu_memory_fraction": "free_gpu_memory_fraction", "kv_cache_dtype": "dtype"}
"""Options that are fields of `kv_cache_config`."""

LOG_LEVEL = option(
    "--log_level", section="Logs", type=click.Choice(LOG_LEVELS, case_sensitive=False), help="Log level."
)


def engine_options(command: Command) -> Command:
    """Add the engine's options to `command`."""
    for add in reversed(_OPTIONS):
        command = add(command)
    return command


def split_options(
    options: Mapping[str, Any], file: Mapping[str, Any], model: str, own_names: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A command's own options, and the arguments of `LLM`; options of the command line override those of the file."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    own = {name: value for name, value in {**file, **given}.items() if name in own_names}
    engine = {name: value for name, value in given.items() if name not in own_names and name not in NOT_FOR_LLM}
    rest = {name: value for name, value in file.items() if name not in own_names}
    cache = {field: engine.pop(name) for name, field in CACHE_FIELDS.items() if name in engine}
    arguments = {**rest, **engine, "model": model}
    if cache:
        arguments["kv_cache_config"] = {**(rest.get("kv_cache_config") or {}), **cache}
    return own, arguments
