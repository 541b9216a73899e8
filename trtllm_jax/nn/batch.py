"""The record that tells a model's layers which tokens they see and where their keys and values live."""

from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from pallas_kernels.attention import PageLocations, Rotation
from trtllm_jax.nn.execution import DEFAULT_EXECUTION, Execution

Cache = jax.Array | None
"""One layer's cache; None where there is none."""

_UNKEPT = 0
"""The page of a token whose key and value must not be kept."""


class RaggedRows(NamedTuple):
    """Rows (sequences) of any number of consecutive tokens each, in a flat batch of t tokens.

    Attributes:
        starts: int32 [r + 1], where each row's tokens begin.
        lengths: int32 [r], tokens of each row, those before the batch's included; 0 for a row that is padding.
        row: int32 [t], each token's row; padding has any.
        inside: bool [t], whether the token is one of a row that is no padding.
        positions: int32 [t], each token's place in its sequence; 0 for padding.
    """

    starts: jax.Array
    lengths: jax.Array
    row: jax.Array
    inside: jax.Array
    positions: jax.Array

    @classmethod
    def of(cls, tokens: int, starts: jax.Array, first: jax.Array, active: jax.Array) -> "RaggedRows":
        """Rows in a batch of so many tokens, whose first ones are at positions `first` [r]; padding is not `active`."""
        lengths = jnp.where(active, first + (starts[1:] - starts[:-1]), 0)
        places = jnp.arange(tokens)
        row = jnp.searchsorted(starts[1:], places, side="right", method="compare_all")
        row = jnp.minimum(row, starts.shape[0] - 2)
        inside = (places < starts[-1]) & active[row]
        return cls(starts, lengths, row, inside, jnp.where(inside, first[row] + places - starts[row], 0))


@flax.struct.dataclass
class Batch:
    """A flat batch of t tokens over a paged cache, or without one.

    Attributes:
        tokens: int32 [t], the ids; padding may hold any valid id.
        positions: int32 [t], each token's place in its sequence.
        rope_lengths: int32 [t], tokens the sequence had when the token entered it (some ropes depend on it).
        locations: where keys and values live in the layer's cache group, and which tokens are whose; None without a
            cache. The forward pass fills it in for each layer.
        groups: the same for every cache group; empty without a cache.
        lengths: int32 [b], without a cache: tokens of each sequence that are not padding. A sequence owns t / b tokens.
        embeddings: [t, embed], what stands in the place of some tokens' embeddings; None for none.
        embedded: bool [t], of which tokens.
        rotations: one of each rope the model names in `ropes`; the forward pass fills them in.
        execution: how and where the layers are computed; static.
        dtype: of activations, None for the embeddings' own; the forward pass fills it in; static.
    """

    tokens: jax.Array
    positions: jax.Array
    rope_lengths: jax.Array
    locations: PageLocations | None = None
    groups: tuple[PageLocations, ...] = ()
    lengths: jax.Array | None = None
    embeddings: jax.Array | None = None
    embedded: jax.Array | None = None
    rotations: tuple[Rotation, ...] = ()
    execution: Execution = flax.struct.field(pytree_node=False, default=DEFAULT_EXECUTION)
    dtype: jnp.dtype | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def of_sequences(cls, tokens: jax.Array, lengths: jax.Array, execution: Execution) -> "Batch":
        """Whole sequences [b, s] of `lengths` [b] without a cache."""
        count, width = tokens.shape
        return cls(
            tokens=tokens.reshape(-1),
            positions=jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (count, width)).reshape(-1),
            rope_lengths=jnp.repeat(lengths, width),
            lengths=lengths,
            execution=execution,
        )

    @classmethod
    def of_ragged_rows(
        cls,
        tokens: jax.Array,
        rows: RaggedRows,
        page_tables: Sequence[jax.Array],
        prompt_lengths: jax.Array,
        page_size: int,
        *,
        execution: Execution = DEFAULT_EXECUTION,
    ) -> "Batch":
        """Rows of any number of tokens; `prompt_lengths` [r] are those of whole prompts.

        `page_tables` are those of every cache group, int32 [r, p].
        """
        positions = rows.positions
        return cls(
            tokens=tokens,
            positions=positions,
            rope_lengths=jnp.maximum(prompt_lengths[rows.row], positions + 1),
            groups=tuple(
                PageLocations(
                    page=jnp.where(rows.inside, table[rows.row, positions // page_size], _UNKEPT),
                    offset=positions % page_size,
                    page_table=table,
                    lengths=rows.lengths,
                    starts=rows.starts,
                )
                for table in page_tables
            ),
            execution=execution,
        )

    @classmethod
    def of_decoding_rows(
        cls,
        tokens: jax.Array,
        positions: jax.Array,
        active: jax.Array,
        page_tables: Sequence[jax.Array],
        page_size: int,
        *,
        execution: Execution = DEFAULT_EXECUTION,
    ) -> "Batch":
        """Equally many new tokens a row, t / r, the first at `positions` [r].

        Rows that are not `active` [r] are padding, at 0. Tokens past the end of their row's page table are not kept.
        `page_tables` are those of every cache group, int32 [r, p].
        """
        rows = active.shape[0]
        each = tokens.shape[0] // rows
        lengths = jnp.where(active, positions + each, 0)
        row = jnp.arange(rows)
        if each > 1:
            row, active = jnp.repeat(row, each), jnp.repeat(active, each)
            positions = (positions[:, None] + jnp.arange(each, dtype=positions.dtype)).reshape(-1)

        def kept(table: jax.Array) -> jax.Array:
            # A single new token has a page; of several, the last may have none.
            return active if each == 1 else active & (positions < table.shape[1] * page_size)

        return cls(
            tokens=tokens,
            positions=positions,
            rope_lengths=positions + 1,
            groups=tuple(
                PageLocations(
                    page=jnp.where(kept(table), table[row, positions // page_size], _UNKEPT),
                    offset=positions % page_size,
                    page_table=table,
                    lengths=lengths,
                )
                for table in page_tables
            ),
            execution=execution,
        )
