"""A model over a paged cache without an engine: the test chooses the tokens of each step."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import sharding
from checkpoints.load import load_params
from checkpoints.source import TensorSource
from trtllm_jax.engine.kv_cache import CacheSpec
from trtllm_jax.nn.batch import Batch, Caches, RaggedRows
from trtllm_jax.nn.model import Model

Prompt = Sequence[int]
Step = Sequence[range]
"""The positions of each prompt that one step computes: consecutive ones, or none."""

PAGE_SIZE = 4
PAGES_OF_A_ROW = 16
TOKENS = 64
"""Tokens of a ragged step, padding included: one program for all steps."""


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """||found - expected|| / ||expected||."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class PagedModel:
    """A model in float32 on the first devices, split over them as the engine splits it."""

    def __init__(self, model: Model, source: TensorSource, tensor_parallel_size: int = 1) -> None:
        self.model = model
        self.mesh = sharding.make_mesh(tensor_parallel_size)
        self.rules = sharding.ShardingRules(self.mesh)
        self.extents = self.rules.extents(model.config.sizes)
        self.params = load_params(
            model.module.table(model.config),
            source,
            extents=self.extents,
            rules=self.rules,
            dtype=jnp.float32,
        )
        self._step = jax.jit(self._compute if tensor_parallel_size == 1 else self._mapped())

    def logits(self, prompts: Sequence[Prompt], steps: Sequence[Step]) -> list[np.ndarray]:
        """Logits [length, vocab] of each prompt, computed in `steps` over pages in random order.

        A step of at most one token a prompt is a decoding step if all steps are.
        """
        decode = all(len(positions) <= 1 for step in steps for positions in step)
        rng, pages = np.random.default_rng(0), len(prompts) * PAGES_OF_A_ROW
        tables = [
            jnp.asarray(1 + rng.permutation(pages).reshape(len(prompts), PAGES_OF_A_ROW), jnp.int32)
            for _ in self.model.cache_groups
        ]
        caches = self._cache().allocate((1 + pages,) * len(tables))
        found: list[list[np.ndarray]] = [[] for _ in prompts]
        for step in steps:
            batch, places = _batch(prompts, step, tables, decode)
            scores, caches = self._step(self.params, caches, batch)
            for row, place in enumerate(places):
                found[row].append(np.asarray(scores)[place])
        return [np.concatenate(parts) for parts in found]

    def _compute(self, params: object, caches: Caches, batch: Batch) -> tuple[jax.Array, Caches]:
        x, caches = self.model.hidden(params, batch, caches)
        return self.model.logits(params, x), caches

    def _mapped(self) -> jax.stages.Wrapped:
        param_specs = jax.tree.map(lambda leaf: leaf.sharding.spec, self.params)
        cache_spec = jax.tree.map(
            lambda array: array.sharding.spec, self._cache().arrays((1,) * len(self.model.cache_groups))
        )
        return jax.shard_map(
            self._compute,
            mesh=self.mesh,
            in_specs=(param_specs, cache_spec, P()),
            out_specs=(P(), cache_spec),
            check_vma=False,
        )

    def _cache(self) -> CacheSpec:
        model = self.model
        return CacheSpec.of(model.cache_groups, model.config.sizes, PAGE_SIZE, jnp.dtype(jnp.float32), self.mesh)


def _batch(
    prompts: Sequence[Prompt], step: Step, tables: Sequence[jax.Array], decode: bool
) -> tuple[Batch, list[slice]]:
    """The batch of a step, and where each prompt's tokens are in it."""
    counts = np.array([len(positions) for positions in step])
    starts = np.cumsum([0, *counts], dtype=np.int32)
    firsts = np.arange(len(prompts)) if decode else starts[:-1]
    places = [slice(first, first + count) for first, count in zip(firsts, counts, strict=True)]
    tokens = np.zeros(len(prompts) if decode else TOKENS, np.int32)
    lengths = np.array([len(prompt) for prompt in prompts])
    for prompt, place, span in zip(prompts, places, step, strict=True):
        tokens[place] = prompt[span.start : span.stop]
    first, ids, active = jnp.array([span.start for span in step]), jnp.asarray(tokens), jnp.asarray(counts > 0)
    if not decode:
        rows = RaggedRows.of(TOKENS, jnp.asarray(starts), first, active)
        return Batch.of_ragged_rows(ids, rows, tables, jnp.asarray(lengths), PAGE_SIZE), places
    batch = Batch.of_decoding_rows(ids, first, active, tables, PAGE_SIZE)
    # As if the whole prompt had entered at once, which dynamic rope sees.
    return batch.replace(rope_lengths=jnp.asarray(lengths)), places
