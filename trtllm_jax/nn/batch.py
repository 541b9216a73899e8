"""The batch that a model computes: its tokens, and where their keys and values are in the cache."""

from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.attention import PageLocations, Rotation
from pallas_kernels.attention.locations import PADDING_PAGE
from trtllm_jax.nn.execution import DEFAULT_EXECUTION, Execution

Cache = Float[Array, "..."] | None
"""A layer's cache; None if the batch has none."""

Caches = tuple[jax.Array, ...]
"""The cache of every layer that has one of its own, in the order of the layers; empty for a batch without pages."""


class RaggedRows(NamedTuple):
    """The rows (sequences) of a flat batch, with any number of consecutive tokens each.

    Attributes:
        starts: where each row's tokens begin, and where the last row's end.
        lengths: the tokens of each row, those before the batch included; 0 for a padding row.
        row: the row of each token; any row for padding.
        inside: whether the token belongs to a row that is not padding.
        positions: each token's place in its sequence; 0 for padding.
    """

    starts: Int32[Array, " r+1"]
    lengths: Int32[Array, " r"]
    row: Int32[Array, " t"]
    inside: Bool[Array, " t"]
    positions: Int32[Array, " t"]

    @classmethod
    def of(
        cls, tokens: int, starts: Int32[Array, " _"], first: Int32[Array, " r"], active: Bool[Array, " r"]
    ) -> "RaggedRows":
        """The rows of a batch of `tokens` tokens, from their `starts` [r + 1] and the positions of their first tokens.

        Rows that are not `active` are padding.
        """
        lengths = jnp.where(active, first + (starts[1:] - starts[:-1]), 0)
        places = jnp.arange(tokens)
        row = jnp.searchsorted(starts[1:], places, side="right", method="compare_all")
        row = jnp.minimum(row, starts.shape[0] - 2)
        inside = (places < starts[-1]) & active[row]
        return cls(starts, lengths, row, inside, jnp.where(inside, first[row] + places - starts[row], 0))


@flax.struct.dataclass
class Batch:
    """A flat batch of t tokens, with a paged cache or without one.

    Attributes:
        tokens: the token ids; padding may have any valid id.
        positions: each token's place in its sequence.
        rope_lengths: how long each token's sequence was when the token was added to it, for ropes that depend on it.
        locations: where the tokens' keys and values are in the cache group of a layer; None without a cache. The
            forward pass sets it for each layer.
        groups: the locations in every cache group; empty without a cache.
        lengths: without a cache, the tokens of each sequence that are not padding; each has t / b tokens with padding.
        embeddings: embeddings that replace those of some tokens; None for none.
        embedded: which tokens those are.
        token_types: the segment of each token of a pair of texts (BERT); None for the first of them.
        rotations: the rotation of each rope that the model names in `ropes`; the forward pass sets them.
        execution: how and where the layers are computed; static.
        dtype: the dtype of activations, None for that of the embeddings; the forward pass sets it; static.
    """

    tokens: Int32[Array, " t"]
    positions: Int32[Array, " t"]
    rope_lengths: Int32[Array, " t"]
    locations: PageLocations | None = None
    groups: tuple[PageLocations, ...] = ()
    lengths: Int32[Array, " b"] | None = None
    embeddings: Float[Array, "t embed"] | None = None
    embedded: Bool[Array, " t"] | None = None
    token_types: Int32[Array, " t"] | None = None
    rotations: tuple[Rotation, ...] = ()
    execution: Execution = flax.struct.field(pytree_node=False, default=DEFAULT_EXECUTION)
    dtype: jnp.dtype | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def of_sequences(
        cls,
        tokens: Int32[Array, "b s"],
        lengths: Int32[Array, " b"],
        execution: Execution,
        token_types: Int32[Array, "b s"] | None = None,
    ) -> "Batch":
        """Whole sequences without a cache, each padded after its first `lengths` tokens."""
        count, width = tokens.shape
        return cls(
            tokens=tokens.reshape(-1),
            positions=jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (count, width)).reshape(-1),
            rope_lengths=jnp.repeat(lengths, width),
            lengths=lengths,
            token_types=None if token_types is None else token_types.reshape(-1),
            execution=execution,
        )

    @classmethod
    def of_ragged_rows(
        cls,
        tokens: Int32[Array, " t"],
        rows: RaggedRows,
        page_tables: Sequence[Int32[Array, "r _"]],
        prompt_lengths: Int32[Array, " r"],
        page_size: int,
        *,
        execution: Execution = DEFAULT_EXECUTION,
    ) -> "Batch":
        """Rows of any number of tokens over a paged cache.

        There is a page table [r, p] for each cache group; `prompt_lengths` are the lengths of the whole prompts.
        """
        positions = rows.positions
        return cls(
            tokens=tokens,
            positions=positions,
            rope_lengths=jnp.maximum(prompt_lengths[rows.row], positions + 1),
            groups=tuple(
                PageLocations(
                    page=jnp.where(rows.inside, table[rows.row, positions // page_size], PADDING_PAGE),
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
        tokens: Int32[Array, " t"],
        positions: Int32[Array, " r"],
        active: Bool[Array, " r"],
        page_tables: Sequence[Int32[Array, "r _"]],
        page_size: int,
        *,
        execution: Execution = DEFAULT_EXECUTION,
    ) -> "Batch":
        """Rows with t / r new tokens each, the first at `positions`, over a paged cache.

        Rows that are not `active` are padding, at position 0. There is a page table [r, p] for each cache group; tokens
        past the end of their row's page table are not kept.
        """
        rows = active.shape[0]
        each = tokens.shape[0] // rows
        lengths = jnp.where(active, positions + each, 0)
        row = jnp.arange(rows)
        if each > 1:
            row, active = jnp.repeat(row, each), jnp.repeat(active, each)
            positions = (positions[:, None] + jnp.arange(each, dtype=positions.dtype)).reshape(-1)

        def kept(table: Array) -> Array:
            # A single new token always has a page; of several, the last may have none.
            return active if each == 1 else active & (positions < table.shape[1] * page_size)

        return cls(
            tokens=tokens,
            positions=positions,
            rope_lengths=positions + 1,
            groups=tuple(
                PageLocations(
                    page=jnp.where(kept(table), table[row, positions // page_size], PADDING_PAGE),
                    offset=positions % page_size,
                    page_table=table,
                    lengths=lengths,
                )
                for table in page_tables
            ),
            execution=execution,
        )
