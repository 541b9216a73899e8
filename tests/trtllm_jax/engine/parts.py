"""The parts of an engine over a tiny model, and a request of every kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp

from trtllm_jax.engine import weights
from trtllm_jax.engine.block_pool import BlockPool
from trtllm_jax.engine.cache_manager import Group, KVCacheManager, pages_per_dispatch
from trtllm_jax.engine.config import Compilation
from trtllm_jax.engine.engine import Engine
from trtllm_jax.engine.kv_cache import CacheSpec
from trtllm_jax.engine.limits import CapacityPolicy, SchedulerLimits
from trtllm_jax.engine.logit_edits import LogitEdits
from trtllm_jax.engine.packer import Packer
from trtllm_jax.engine.program_table import Sizes
from trtllm_jax.engine.programs import Programs
from trtllm_jax.engine.request import Request, Update
from trtllm_jax.engine.runner import Runner
from trtllm_jax.engine.sampling import Sampling
from trtllm_jax.engine.scheduler import Scheduler
from trtllm_jax.llmapi.llm_args import parse_llm_args
from trtllm_jax.llmapi.loading import load

LIMITS = SchedulerLimits(max_batch_size=4, max_num_tokens=16, max_seq_len=32, max_decode_steps=4)
PAGE_SIZE, PAGES = 4, 24


class Parts:
    """Compiled programs and weights of a tiny model, for any number of engines."""

    def __init__(self, folder: Path) -> None:
        loaded = load(parse_llm_args(model=folder, dtype="float32"))
        model = loaded.model
        self.params, self.mesh = loaded.params, loaded.mesh
        self.spec = CacheSpec.of(model.cache_groups, model.config.sizes, PAGE_SIZE, jnp.dtype("float32"), self.mesh)
        width, new_pages = LIMITS.max_seq_len // PAGE_SIZE, pages_per_dispatch(LIMITS, PAGE_SIZE)
        sizes = Sizes(model, LIMITS, PAGE_SIZE, (width,), new_pages)
        shapes = weights.shapes_of(self.params)
        self.programs = Programs(sizes, self.mesh, shapes, self.spec.arrays((PAGES,)))
        self.programs.compile(Compilation.BEFORE, lambda done, total: None)

    def engine(self, sink: Callable[[Sequence[Update]], None]) -> Engine:
        return Engine(self.scheduler(), Packer(self.programs), self.runner(), sink)

    def scheduler(self) -> Scheduler:
        cache = KVCacheManager(LIMITS, [Group(BlockPool(PAGES, PAGE_SIZE))])
        return Scheduler(LIMITS, cache, CapacityPolicy.MAX_UTILIZATION)

    def runner(self) -> Runner:
        return Runner(self.programs, self.params, self.spec.allocate((PAGES,)))


def requests_of_every_kind() -> list[Request]:
    greedy = Sampling(temperature=1.0, top_k=1, top_p=1.0, min_p=0.0, seed=0, greedy=True)
    sampled = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1, greedy=False)
    by_hand = LogitEdits(processors=(lambda *_: None,))
    # Longer than whole pages, and running for long: its fork copies the partly filled page.
    first = Request(tuple(range(10)), 20, sampled)
    return [
        first,
        Request(first.prompt, 6, sampled, parent=first),
        Request((1, 2, 3), 20, greedy),
        Request(tuple(range(9)), 6, sampled, num_logprobs=2, stop_ids=frozenset({3})),
        Request((3, 3, 4), 6, greedy, edits=LogitEdits(repetition=1.3, no_repeat_ngram=2)),
        Request((5,), 5, greedy, edits=LogitEdits(bad=((1, 2),))),
        Request((6, 6), 5, greedy, edits=by_hand, num_logprobs=1),
        Request(tuple(range(12)), 3, greedy, reports=frozenset({"context_logits", "generation_logits"})),
        Request((8, 9), 1, greedy, reports=frozenset({"embedding"})),
    ]
