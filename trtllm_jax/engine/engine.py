"""The engine: builds the compiled programs and the cache, then runs the batching loop in one thread."""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

import sharding
from trtllm_jax.engine import weights
from trtllm_jax.engine.block_pool import BlockPool
from trtllm_jax.engine.changes import changes_of, follow
from trtllm_jax.engine.config import EngineConfig, backend_defaults
from trtllm_jax.engine.events import CacheEvents, Record, iteration_stats
from trtllm_jax.engine.host_sampling import draw_on_host
from trtllm_jax.engine.kv_cache import CacheSpec, pool_pages
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.programs import Programs
from trtllm_jax.engine.request import FinishReason, Request, Update
from trtllm_jax.engine.runner import InFlight, Runner
from trtllm_jax.engine.scheduler import Scheduler, SchedulerLimits
from trtllm_jax.engine.steps import Model
from trtllm_jax.errors import EngineDeadError, RequestError
from trtllm_jax.logger import logger
from trtllm_jax.models.config import CacheGroup

NOMINAL_PAGES = 1024
"""Pool size of the compile that measures a step's temporary bytes; they do not depend on it."""


@dataclass(frozen=True)
class StartUp:
    """What the engine chose and how long it took, for the start-up line."""

    limits: SchedulerLimits
    kv_tokens: int
    kv_dtype: str
    token_buckets: tuple[int, ...]
    row_buckets: tuple[int, ...]
    compile_seconds: float


class Engine:
    """Runs submitted sequences to their end; every method may be called from any thread.

    Args:
        model: the pure functions.
        params: the weights on the mesh.
        mesh: the devices.
        config: sizes and policy.
        sink: called from the engine's thread with the updates of each step; must not block.
        progress: told how many programs are compiled of how many.

    Raises:
        MemoryError: the cache does not fit; names the knob.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        mesh: Mesh,
        config: EngineConfig,
        sink: Callable[[Sequence[Update]], None],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        weight_dtype = params["embed"].dtype
        # A CPU computes attention in float32; a narrower cache would cost a conversion a step.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        kv_dtype = jnp.dtype(config.kv_dtype or ("float32" if on_cpu else weight_dtype))
        spec = CacheSpec(_padded_group(model, mesh), config.page_size, kv_dtype)
        started = time.perf_counter()
        # Whatever keeps the weights themselves would keep their memory when others take their place.
        self._weight_shapes = weights.shapes_of(params)
        self.limits, pages = _size(model, self._weight_shapes, mesh, config, spec)
        table_width = -(-self.limits.max_seq_len // spec.page_size)
        programs = Programs(model, mesh, self._weight_shapes, spec.arrays(pages, mesh), self.limits, table_width)
        programs.compile(progress)
        self.start_up = StartUp(
            limits=self.limits,
            kv_tokens=(pages - 1) * spec.page_size,
            kv_dtype=kv_dtype.name,
            token_buckets=programs.token_buckets,
            row_buckets=programs.row_buckets,
            compile_seconds=time.perf_counter() - started,
        )
        self.cache_events = CacheEvents(config.event_buffer, pages - 1) if config.event_buffer else None
        self._pool = BlockPool(pages, spec.page_size, reuse=config.reuse, observer=self.cache_events)
        self._scheduler = Scheduler(self.limits, self._pool, config.policy)
        caches = spec.allocate(pages, mesh)
        self._runner = Runner(programs, params, caches, mesh, self.limits.max_batch_size, table_width)
        self._vocab = model.config.vocab
        self._look_ahead = config.look_ahead
        self._batched_processor = config.batched_processor
        self._sink = sink
        self._stats: deque[Record] = deque(maxlen=config.stats_length)
        self._iteration = 0
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="trtllm_jax-engine", daemon=True)
        self._thread.start()

    @property
    def kv_pages(self) -> int:
        """Pages that sequences can hold."""
        return self._pool.capacity

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self._pool.page_size

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue sequences; their updates go to the sink.

        Raises:
            RequestError: a sequence cannot fit the engine; none of them is queued.
            EngineDeadError: the engine's thread failed.
            RuntimeError: the engine is shut down.
        """
        for request in requests:
            if not request.prompt:
                raise RequestError("the prompt holds no tokens; give at least one")
            if request.limit > self.limits.max_seq_len:
                raise RequestError(
                    f"prompt of {len(request.prompt)} tokens and max_tokens={request.max_tokens} exceed "
                    f"max_seq_len={self.limits.max_seq_len}; shorten one or raise max_seq_len"
                )

        def queue_all() -> None:
            for request in requests:
                self._scheduler.submit(request)

        self._command(queue_all)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a sequence soon; no effect if it has ended. Its last update tells the reason."""

        def end() -> None:
            update = self._scheduler.finish(request, reason)
            if update:
                self._sink([update])

        # A dead or closed engine has ended every sequence and said so.
        with contextlib.suppress(RuntimeError):
            self._command(end)

    @property
    def params(self) -> Any:
        """The weights that the next step will read: the engine's own arrays.

        Raises EngineDeadError or RuntimeError as `submit` does.
        """
        if refusal := self._refusal():
            raise refusal
        return self._runner.params

    def update_weights(self, params: Any, *, copy: bool) -> None:
        """Have every step from the next one on read `params`, or copies; returns when no later step reads others.

        Raises:
            ValueError: they do not fit; nothing has changed.
            EngineDeadError: the engine's thread failed.
            RuntimeError: the engine is shut down.
        """
        fitted = weights.fitted(params, self._weight_shapes, copy=copy)
        swapped: Future[None] = Future()

        def swap() -> None:
            if refusal := self._refusal():
                swapped.set_exception(refusal)
                return
            self._runner.params = fitted
            self._scheduler.begin_weights()
            swapped.set_result(None)

        self._command(swap)
        swapped.result()

    def drain_stats(self) -> list[Record]:
        """The statistics of the steps since the last call, oldest first."""
        stats = []
        while self._stats:
            stats.append(self._stats.popleft())
        return stats

    def close(self) -> None:
        """End every sequence as cancelled, stop the thread and free the cache; may be called again."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            self._commands.put(lambda: None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _command(self, command: Callable[[], Any]) -> None:
        with self._lock:
            if refusal := self._refusal():
                raise refusal
            self._commands.put(command)

    def _refusal(self) -> RuntimeError | None:
        """Why nothing more can be asked of this engine, if that is so."""
        return self.failure or (RuntimeError("LLM is shutting down") if self._closed else None)

    @property
    def failure(self) -> EngineDeadError | None:
        """What ended the engine's thread, None while it lives or where it was closed."""
        if self._failure is None:
            return None
        error = EngineDeadError(f"the engine stopped: {self._failure!r}")
        error.__cause__ = self._failure
        return error

    # ---- the engine's thread ----

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as failure:
            with self._lock:
                self._failure = self._runner.explained(failure)
        self._end_everything()
        self._runner.close()

    def _loop(self) -> None:
        """One step ahead: while the device runs step n, the host plans n + 1, then reads the tokens of n."""
        flight: InFlight | None = None
        while True:
            self._obey(wait=flight is None and not self._scheduler.has_work)
            if self._closed:
                return
            plan = self._scheduler.schedule()
            if plan is None and flight is None and self._scheduler.has_work:
                raise RuntimeError("no sequence can run, and none is running: a fault of the scheduler")
            following = self._dispatch(plan) if plan else None
            if flight:
                self._commit(flight)
            flight = following
            if flight and not self._look_ahead:
                self._commit(flight)
                flight = None

    def _obey(self, wait: bool) -> None:
        """Carry out what other threads asked for; `wait` for something if there is nothing else to do."""
        if wait:
            self._commands.get()()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _dispatch(self, plan: StepPlan) -> InFlight:
        flight = self._runner.dispatch(plan)
        if not plan.edited:
            return flight
        # While the device computes the step: only the draw needs them.
        return self._runner.draw_edited(flight, changes_of(plan, self._vocab, self._runner.edits_at_once))

    def _commit(self, flight: InFlight) -> None:
        started = time.perf_counter()
        plan, (tokens, logprobs, logits, embeddings, failures) = flight.plan, flight.brought()
        if plan.drawn_on_host:
            drawn = draw_on_host(plan, logits, self._runner.draw, self._batched_processor)
            failures |= drawn.failures
            for row in plan.drawn_on_host:
                tokens[row] = [drawn.tokens[row]] if row in drawn.tokens else []
            logprobs |= {row: [found] for row, found in drawn.logprobs.items()}
        failures = follow(plan, tokens, failures)
        updates = self._scheduler.commit(plan, tokens, logprobs, logits, failures, embeddings)
        if updates:
            self._sink(updates)
        self._iteration += 1
        if self._stats.maxlen:
            seconds = time.perf_counter() - started
            self._stats.append(iteration_stats(self._iteration, seconds, plan, self._scheduler))

    def _end_everything(self) -> None:
        """Tell every owner that its sequence ends here, submitted ones that were never seen included."""
        while True:
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                break
        unfinished = [*self._scheduler.running, *self._scheduler.waiting]
        error = self.failure
        for request in unfinished:
            request.finished = FinishReason.CANCELLED
        if unfinished:
            self._sink([Update(request, finish=FinishReason.CANCELLED, error=error) for request in unfinished])


def _padded_group(model: Model, mesh: Mesh) -> CacheGroup:
    """The model's cache group with its heads padded as its weights are."""
    (group,) = model.module.cache_spec(model.config)
    heads = sharding.pad_sizes({"kv_heads": group.kv_heads}, mesh)["kv_heads"]
    return CacheGroup(group.layers, heads, group.head_dim)


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
