"""From a model and its weights to a running engine: sizes that fit the memory, compiled programs, the cache."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from sharding import ShardingRules
from trtllm_jax.engine import weights
from trtllm_jax.engine.block_pool import BlockPool
from trtllm_jax.engine.config import EngineConfig, backend_defaults, compilation
from trtllm_jax.engine.engine import Engine
from trtllm_jax.engine.events import CacheEvents
from trtllm_jax.engine.kv_cache import CacheSpec, pool_pages
from trtllm_jax.engine.programs import Programs
from trtllm_jax.engine.request import Update
from trtllm_jax.engine.runner import Runner
from trtllm_jax.engine.scheduler import Scheduler, SchedulerLimits
from trtllm_jax.logger import logger
from trtllm_jax.nn.cache_group import CacheGroup
from trtllm_jax.nn.model import Model

NOMINAL_PAGES = 1024
"""Pool size of the compile that measures a step's temporary bytes; they do not depend on it."""


@dataclass(frozen=True)
class StartUp:
    """What was chosen and how long it took, for the start-up line."""

    limits: SchedulerLimits
    kv_tokens: int
    kv_dtype: str
    token_buckets: tuple[int, ...]
    row_buckets: tuple[int, ...]
    compile_seconds: float


def build_engine(
    model: Model,
    params: Any,
    mesh: Mesh,
    config: EngineConfig,
    sink: Callable[[Sequence[Update]], None],
    ended: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Engine, StartUp]:
    """An engine that runs, and what was chosen for it.

    Args:
        model: the pure functions.
        params: the weights on the mesh.
        mesh: the devices.
        config: sizes and policy.
        sink: as in `Engine`, and so is `ended`.
        progress: told how many programs are compiled of how many.

    Raises:
        MemoryError: the cache does not fit; names the knob.
    """
    weight_dtype = params["embed"].dtype
    # A CPU computes attention in float32; a narrower cache would cost a conversion a step.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    kv_dtype = jnp.dtype(config.kv_dtype or ("float32" if on_cpu else weight_dtype))
    spec = CacheSpec(_placed_group(model, mesh), config.page_size, kv_dtype)
    started = time.perf_counter()
    # Whatever keeps the weights themselves would keep their memory when others take their place.
    shapes = weights.shapes_of(params)
    limits, pages = _size(model, shapes, mesh, config, spec)
    table_width = -(-limits.max_seq_len // spec.page_size)
    programs = Programs(model, mesh, shapes, spec.arrays(pages, mesh), limits, table_width)
    try:
        programs.compile(compilation(config.eager), progress)
        compile_seconds = time.perf_counter() - started
        events = CacheEvents(config.event_buffer, pages - 1) if config.event_buffer else None
        pool = BlockPool(pages, spec.page_size, reuse=config.reuse, observer=events)
        runner = Runner(programs, params, spec.allocate(pages, mesh), mesh)
        engine = Engine(
            Scheduler(limits, pool, config.policy, model.rope_stretch),
            runner,
            sink,
            ended,
            overlap_scheduling=config.overlap_scheduling,
            batched_processor=config.batched_processor,
            cache_events=events,
            stats_length=config.stats_length,
        )
    except BaseException:
        # Programs may be compiled beside this, and nobody else will end that.
        programs.close()
        raise
    start_up = StartUp(
        limits=limits,
        kv_tokens=(pages - 1) * spec.page_size,
        kv_dtype=kv_dtype.name,
        token_buckets=programs.token_buckets,
        row_buckets=programs.row_buckets,
        compile_seconds=compile_seconds,
    )
    return engine, start_up


def _placed_group(model: Model, mesh: Mesh) -> CacheGroup:
    """The model's cache group with its heads padded or repeated as those of its weights are."""
    (group,) = model.module.cache_spec(model.config)
    extents = ShardingRules(mesh).extents(model.config.sizes | {"kv_heads": group.kv_heads})
    return CacheGroup(group.layers, extents["kv_heads"], group.head_dim)


def _size(model: Model, params: Any, mesh: Mesh, config: EngineConfig, spec: CacheSpec) -> tuple[SchedulerLimits, int]:
    """The limits and the pages of the pool: what was asked for, clamped to what the memory holds, with a warning."""
    defaults = backend_defaults()
    batch = config.max_batch_size or defaults.max_batch_size
    length = config.max_seq_len or model.config.max_position
    # All sequences together have no more tokens, so no step has.
    tokens = min(max(config.max_num_tokens or defaults.max_num_tokens, batch), batch * length)
    decode_steps = config.max_decode_steps or defaults.max_decode_steps
    wanted = SchedulerLimits(batch, tokens, length, decode_steps)

    temporary = 0
    if mesh.devices.flat[0].platform != "cpu":
        width = -(-length // spec.page_size)
        nominal = spec.arrays(NOMINAL_PAGES, mesh)
        temporary = Programs(model, mesh, params, nominal, wanted, width).temporary_bytes()
    pages = pool_pages(spec, mesh, config.kv_fraction, temporary, config.kv_tokens)
    room = pages - 1
    limits = replace(wanted, max_batch_size=min(batch, room), max_seq_len=min(length, room * spec.page_size))
    for name in ("max_batch_size", "max_seq_len"):
        if getattr(config, name) and getattr(limits, name) < getattr(config, name):
            logger.warning(
                "%s = %d is lowered to %d: the KV cache has %d tokens in blocks of %d; for more raise "
                "kv_cache_config.max_tokens or free_gpu_memory_fraction",
                name, getattr(config, name), getattr(limits, name), room * spec.page_size, spec.page_size,
            )  # fmt: skip
    return limits, pages
