"""What the device remembers of each running sequence between steps; donated from step to step."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from trtllm_jax.common.numbers import INT32_MAX
from trtllm_jax.engine.packing import Field
from trtllm_jax.engine.request import MAX_DEVICE_STOPS, Request

NO_TOKEN = -1


@flax.struct.dataclass
class RowSamplingParams:
    """How each row draws and when it ends; sent by the host with every ragged step.

    Attributes:
        limit: int32 [r], tokens the sequence can reach.
        stop_ids: int32 [r, MAX_DEVICE_STOPS], -1 where unused.
        temperature: float32 [r], 0 for a greedy row.
        top_k: int32 [r], 0 for no limit.
        top_p: float32 [r].
        min_p: float32 [r].
        seed: uint32 [r, 2], the high and low word.
    """

    limit: jax.Array
    stop_ids: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array


@flax.struct.dataclass
class RowState:
    """The sequences' rows; the row after the last slot is no sequence's, and takes what padding writes.

    Attributes:
        token: int32 [s], the last token, whose key and value are not written yet.
        position: int32 [s], its place in the sequence.
        done: bool [s], whether the sequence ended on the device.
        page_tables: for each cache group int32 [s, p], the pages of the sequence, in order.
        sampling: each [s, ...].
    """

    token: jax.Array
    position: jax.Array
    done: jax.Array
    page_tables: tuple[jax.Array, ...]
    sampling: RowSamplingParams

    @classmethod
    def empty(cls, slots: int, pages: tuple[int, ...]) -> "RowState":
        """`slots` rows of up to `pages` pages in each cache group, and the padding row, none of them running."""
        rows = slots + 1
        integers = jnp.zeros(rows, jnp.int32)
        floats = jnp.zeros(rows, jnp.float32)
        return cls(
            token=integers,
            position=integers,
            done=jnp.ones(rows, jnp.bool_),
            page_tables=tuple(jnp.zeros((rows, width), jnp.int32) for width in pages),
            sampling=RowSamplingParams(
                limit=integers,
                stop_ids=jnp.full((rows, MAX_DEVICE_STOPS), NO_TOKEN, jnp.int32),
                temperature=floats,
                top_k=integers,
                top_p=floats,
                min_p=floats,
                seed=jnp.zeros((rows, 2), jnp.uint32),
            ),
        )

    def advance(self, sampled: jax.Array, active: jax.Array, position: jax.Array) -> "RowState":
        """The rows after `active` ones drew `sampled` [r] for `position` [r]; a stop id or the limit ends them."""
        stopped = (sampled[:, None] == self.sampling.stop_ids).any(-1) | (position + 1 >= self.sampling.limit)
        return replace(
            self,
            token=jnp.where(active, sampled, self.token),
            position=jnp.where(active, position, self.position),
            done=jnp.where(active, stopped, self.done),
        )


def sampling_fields(rows: int) -> tuple[Field, ...]:
    """The packed form of `RowSamplingParams` for `rows` rows."""
    return (
        Field("limit", (rows,)),
        Field("stop_ids", (rows, MAX_DEVICE_STOPS)),
        Field("temperature", (rows,), np.float32),
        Field("top_k", (rows,)),
        Field("top_p", (rows,), np.float32),
        Field("min_p", (rows,), np.float32),
        Field("seed", (rows, 2), np.uint32),
    )


@lru_cache
def _device_stops(stop_ids: frozenset[int]) -> tuple[int, ...]:
    """The ids that the device looks for, NO_TOKEN after the last; a token's id is an int32, others stop nothing."""
    ids = sorted(token for token in stop_ids if 0 <= token <= INT32_MAX)[:MAX_DEVICE_STOPS]
    return (*ids, *[NO_TOKEN] * (MAX_DEVICE_STOPS - len(ids)))


def sampling_arrays(requests: Sequence[Request]) -> dict[str, np.ndarray]:
    """The host arrays of `RowSamplingParams` for these sequences, ready to pack."""
    rules = [request.sampling for request in requests]
    seed = np.array([rule.seed or 0 for rule in rules], np.uint64)
    return {
        "limit": np.array([request.limit for request in requests], np.int32),
        "stop_ids": np.array([_device_stops(request.stop_ids) for request in requests], np.int32),
        "temperature": np.array([0.0 if rule.greedy else rule.temperature for rule in rules], np.float32),
        "top_k": np.array([min(rule.top_k, INT32_MAX) for rule in rules], np.int32),
        "top_p": np.array([request.top_p for request in requests], np.float32),
        "min_p": np.array([rule.min_p for rule in rules], np.float32),
        "seed": np.stack([seed >> 32, seed & 0xFFFFFFFF], axis=1).astype(np.uint32),
    }
