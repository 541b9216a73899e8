"""From a model and its weights to a running engine: sizes that fit the memory, compiled programs, the cache."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from trtllm_jax.engine import sizing, weights
from trtllm_jax.engine.block_pool import BlockPool
from trtllm_jax.engine.cache_manager import Group, KVCacheManager, counted_group, pages_per_dispatch
from trtllm_jax.engine.config import EngineConfig, backend_defaults, compilation
from trtllm_jax.engine.encode_build import build_encode_engine
from trtllm_jax.engine.engine import Engine
from trtllm_jax.engine.events import CacheEvents
from trtllm_jax.engine.kv_cache import CacheSpec, pool_columns
from trtllm_jax.engine.limits import SchedulerLimits
from trtllm_jax.engine.packer import Packer
from trtllm_jax.engine.program_table import Sizes
from trtllm_jax.engine.programs import Programs
from trtllm_jax.engine.request import Update
from trtllm_jax.engine.runner import Runner
from trtllm_jax.engine.scheduler import Scheduler
from trtllm_jax.engine.sizing import Sizing
from trtllm_jax.engine.start_up import StartUp
from trtllm_jax.logger import logger
from trtllm_jax.nn.dtypes import activation_dtype
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.model import Model

NOMINAL_PAGES = 1024
"""Pool size of the compile that measures a step's temporary bytes; they do not depend on it."""


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
        progress: called with the number of programs compiled so far, and of all that are waited for.

    Raises:
        MemoryError: the cache does not fit; names the knob.
    """
    model = replace(model, execution=Execution.on(mesh))
    if not model.cache_groups:
        return build_encode_engine(model, params, mesh, config, sink, ended, progress)
    # A CPU computes attention in float32; a narrower cache would cost a conversion a step.
    kv_dtype = jnp.dtype(config.kv_dtype or activation_dtype(model.weight_dtype(params), model.platform))
    spec = CacheSpec.of(model.cache_groups, model.config.sizes, config.page_size, kv_dtype, mesh)
    started = time.perf_counter()
    # Whatever keeps the weights themselves would keep their memory when others take their place.
    shapes = weights.shapes_of(params)
    limits, pages, measured = _size(model, shapes, mesh, config, spec)
    programs = Programs(_sizes(model, limits, spec), mesh, shapes, spec.arrays(pages))
    try:
        programs.compile(compilation(config.eager, model.platform), progress)
        compile_seconds = time.perf_counter() - started
        groups, pool, events = _page_pools(config, spec, pages)
        engine = Engine(
            Scheduler(limits, KVCacheManager(limits, groups, model.rope_stretch), config.policy),
            Packer(programs),
            Runner(programs, params, spec.allocate(pages)),
            sink,
            ended,
            overlap_scheduling=config.overlap_scheduling,
            batched_processor=config.batched_processor,
            cache_events=events,
            stats_length=config.stats_length,
        )
    except BaseException:
        # Background threads may still compile programs, and nothing else would stop them.
        programs.close()
        raise
    if measured is not None:
        # Only what an engine could be made with is worth keeping.
        sizing.write(*measured)
    sizes = programs.sizes
    described = (
        f"KV cache of {pool.capacity * spec.page_size} tokens in {kv_dtype.name}; up to {limits.max_batch_size} "
        f"sequences of {limits.max_seq_len} tokens, {limits.max_num_tokens} tokens a step; steps for "
        f"{sizes.token_buckets} tokens and {sizes.row_buckets} rows"
    )
    return engine, StartUp(limits, described, compile_seconds)


def _page_pools(
    config: EngineConfig, spec: CacheSpec, pages: Sequence[int]
) -> tuple[list[Group], BlockPool, CacheEvents | None]:
    """The groups with so many pages each, the pool that statistics are about, and its events if they are kept."""
    groups = [
        Group(BlockPool(count, spec.page_size, reuse=config.reuse), group.reach)
        for count, group in zip(pages, spec.groups, strict=True)
    ]
    pool = counted_group(groups).pool
    pool.observer = events = CacheEvents(config.event_buffer, pool.capacity) if config.event_buffer else None
    return groups, pool, events


def _sizes(model: Model, limits: SchedulerLimits, spec: CacheSpec) -> Sizes:
    width = -(-limits.max_seq_len // spec.page_size)
    new_pages = pages_per_dispatch(limits, spec.page_size)
    return Sizes(model, limits, spec.page_size, (width,) * len(spec.groups), new_pages)


def _size(
    model: Model, params: Any, mesh: Mesh, config: EngineConfig, spec: CacheSpec
) -> tuple[SchedulerLimits, tuple[int, ...], tuple[str, Sizing] | None]:
    """The limits and the pages of each group: as configured, or reduced to what memory holds, with a warning.

    Last what the next start need not measure, by name.
    """
    wanted = _wanted_limits(model, config)
    columns, measured = _columns(model, params, mesh, config, spec, wanted)
    room = columns - 1
    limits = replace(
        wanted,
        max_batch_size=min(wanted.max_batch_size, room),
        max_seq_len=min(wanted.max_seq_len, room * spec.page_size),
    )
    for name in ("max_batch_size", "max_seq_len"):
        if getattr(config, name) and getattr(limits, name) < getattr(config, name):
            logger.warning(
                "%s = %d is lowered to %d: the KV cache has %d tokens in blocks of %d; for more raise "
                "kv_cache_config.max_tokens or free_gpu_memory_fraction",
                name, getattr(config, name), getattr(limits, name), room * spec.page_size, spec.page_size,
            )  # fmt: skip
    return limits, spec.pages(columns, wanted), measured


def _wanted_limits(model: Model, config: EngineConfig) -> SchedulerLimits:
    defaults = backend_defaults(model.platform)
    batch = config.max_batch_size or defaults.max_batch_size
    length = config.max_seq_len or model.config.max_position
    # All sequences together have no more tokens, so no step has.
    tokens = min(max(config.max_num_tokens or defaults.max_num_tokens, batch), batch * length)
    return SchedulerLimits(
        max_batch_size=batch,
        max_num_tokens=tokens,
        max_seq_len=length,
        max_decode_steps=config.max_decode_steps or defaults.max_decode_steps,
        fixed_decode_steps=not model.platform.on_cpu,
    )


def _columns(
    model: Model, params: Any, mesh: Mesh, config: EngineConfig, spec: CacheSpec, wanted: SchedulerLimits
) -> tuple[int, tuple[str, Sizing] | None]:
    """The columns of the KV cache; a GPU's leave room for the largest step, as measured now or at an earlier start."""
    if model.platform.on_cpu:
        return pool_columns(spec, mesh, wanted, config.kv_fraction, 0, config.kv_tokens), None
    memory = config.kv_fraction, config.kv_tokens
    key = sizing.key_of(model.module.__name__, model.config, jax.tree.map(str, params), spec, wanted, memory)
    known = sizing.read(key)
    if known is None:
        nominal = spec.arrays((NOMINAL_PAGES,) * len(spec.groups))
        temporary = Programs(_sizes(model, wanted, spec), mesh, params, nominal).temporary_bytes()
    else:
        temporary = known.temporary_bytes
    columns = pool_columns(spec, mesh, wanted, config.kv_fraction, temporary, config.kv_tokens)
    if known is not None and config.kv_tokens is None:
        columns = known.columns_that_fit(columns)
    return columns, (key, Sizing(temporary, columns))
