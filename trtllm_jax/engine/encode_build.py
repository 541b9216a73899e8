"""From a model that computes whole sequences, and its weights, to a running engine."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from trtllm_jax.engine import weights
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
from trtllm_jax.nn.model import Model


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
    limits = _limits(model, config)
    started = time.perf_counter()
    programs = Programs(Sizes(model, limits, 1, (), 0), mesh, weights.shapes_of(params), ())
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
