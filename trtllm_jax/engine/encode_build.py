"""From a model that computes whole sequences, and its weights, to a running engine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jax.sharding import Mesh

from trtllm_jax.engine import device_memory, weights
from trtllm_jax.engine.config import EngineConfig, backend_defaults, compilation, encode_widths
from trtllm_jax.engine.encode_scheduler import EncodeScheduler
from trtllm_jax.engine.engine import Engine
from trtllm_jax.engine.limits import SchedulerLimits
from trtllm_jax.engine.packer import Packer
from trtllm_jax.engine.program_table import Sizes
from trtllm_jax.engine.programs import Programs
from trtllm_jax.engine.request import Update
from trtllm_jax.engine.runner import Runner
from trtllm_jax.engine.start_up import StartUp
from trtllm_jax.logger import logger
from trtllm_jax.nn.model import Model

LARGEST_AT_ONCE = 2
"""How often a step holds an array as large as its largest: attention in XLA keeps all scores, and their softmax."""


def build_encode_engine(
    model: Model,
    params: Any,
    mesh: Mesh,
    config: EngineConfig,
    sink: Callable[[Sequence[Update]], None],
    ended: Callable[[], None],
    progress: Callable[[int, int], None],
) -> tuple[Engine, StartUp]:
    """An engine without a KV cache, and what was chosen for it; arguments as for `build_engine`."""
    started = time.perf_counter()
    shapes = weights.shapes_of(params)
    limits = _that_fit(_limits(model, config), model, shapes, mesh, config)
    programs = Programs(Sizes(model, limits, 1, (), 0), mesh, shapes, ())
    try:
        programs.compile(compilation(config.eager, model.platform), progress)
        compile_seconds = time.perf_counter() - started
        engine = Engine(
            EncodeScheduler(limits, encode_widths(limits.max_seq_len)),
            Packer(programs),
            Runner(programs, params, ()),
            sink,
            ended,
            overlap_scheduling=config.overlap_scheduling,
            stats_length=config.stats_length,
        )
    except BaseException:
        programs.close()
        raise
    described = (
        f"whole texts of up to {limits.max_seq_len} tokens, {limits.max_batch_size} texts and {limits.max_num_tokens} "
        "tokens a step"
    )
    return engine, StartUp(limits, described, compile_seconds)


def _limits(model: Model, config: EngineConfig) -> SchedulerLimits:
    """The limits as configured; a step has room for the longest sequence."""
    defaults = backend_defaults(model.platform)
    length = config.max_seq_len or model.config.max_position
    return SchedulerLimits(
        max_batch_size=config.max_batch_size or defaults.max_batch_size,
        max_num_tokens=max(config.max_num_tokens or defaults.max_num_tokens, length),
        max_seq_len=length,
        max_decode_steps=1,
    )


def _that_fit(wanted: SchedulerLimits, model: Model, shapes: Any, mesh: Mesh, config: EngineConfig) -> SchedulerLimits:
    """The limits, with fewer tokens a step where the memory does not hold as many of the longest sequences.

    What a step takes grows with its tokens and, where attention keeps all scores, with the length of its sequences; so
    shorter ones fit where the longest do. Where no `max_seq_len` is given, the longest are as long as fits. MemoryError
    if not even one of those does, before anything is compiled.
    """

    def bytes_of_one(length: int) -> int:
        alone = replace(wanted, max_batch_size=1, max_num_tokens=length, max_seq_len=length)
        programs = Programs(Sizes(model, alone, 1, (), 0), mesh, shapes, ())
        return LARGEST_AT_ONCE * programs.largest_array_bytes(("encode", 1, length))

    length, free = wanted.max_seq_len, max(device_memory.for_steps(mesh), 0)
    while (needed := bytes_of_one(length)) > free and config.max_seq_len is None and length > 1:
        length //= 2
    if length < wanted.max_seq_len:
        logger.warning(
            "max_seq_len is %d, because the memory holds no whole text of the model's %d tokens; for more give "
            "max_seq_len, or raise tensor_parallel_size",
            length, wanted.max_seq_len,
        )  # fmt: skip
        wanted = replace(wanted, max_seq_len=length)
    if needed > free:
        raise MemoryError(
            f"max_seq_len={length} needs {needed / 2**30:.2f} GiB on each device to compute one text of that length "
            f"whole, and {free / 2**30:.2f} GiB are there: lower max_seq_len, or raise tensor_parallel_size"
        )
    tokens = min(wanted.max_num_tokens, free // needed * length)
    if tokens < wanted.max_num_tokens and config.max_num_tokens:
        logger.warning(
            "max_num_tokens = %d is lowered to %d: a text of %d tokens takes %.2f GiB on each device, and %.2f GiB are "
            "there; for more lower max_seq_len or raise tensor_parallel_size",
            config.max_num_tokens, tokens, length, needed / 2**30, free / 2**30,
        )  # fmt: skip
    return replace(wanted, max_num_tokens=tokens)
