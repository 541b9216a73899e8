"""The decode loop of a generation: each step draws a token for every row, until all rows have ended."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trtllm_jax.functional.draws import Draw
from trtllm_jax.functional.model import Model
from trtllm_jax.functional.prefill import PAGE_SIZE
from trtllm_jax.nn.batch import Batch, Caches

PAD_ID = -1
"""Fills a row after its last token; not in any vocabulary, so that the generated tokens can be counted."""


class Generated(NamedTuple):
    """The result of a generation.

    Attributes:
        tokens: int32 [b, max_new_tokens], including an end id, then padding.
        logprobs: float32 [b, max_new_tokens], the tokens' log-probabilities before temperature, top-k, top-p and min-p,
            as the engine reports them; 0 for padding.
    """

    tokens: jax.Array
    logprobs: jax.Array


class State(NamedTuple):
    """The state of the loop.

    Attributes:
        step: int32 scalar, the number of tokens generated for each row.
        token: int32 [b], the newest token of each row.
        position: int32 [b], the newest token's position in its sequence.
        active: bool [b], whether the row has not ended.
        caches: the KV caches.
        out: what was generated.
    """

    step: jax.Array
    token: jax.Array
    position: jax.Array
    active: jax.Array
    caches: Caches
    out: Generated


@dataclass(frozen=True)
class DecodeLoop:
    """The functions of a decode loop, and what all its steps share.

    Attributes:
        model: the pure functions.
        params: the weights.
        draw: chooses the next token of each row.
        lengths: int32 [b], tokens of each prompt; a row with an empty prompt generates nothing.
        table: int32 [b, p], the page table.
        max_new_tokens: most tokens to generate for a row.
        end_ids: ids that end a row.
        pad_id: fills a row after its last token.
    """

    model: Model
    params: Any
    draw: Draw
    lengths: jax.Array
    table: jax.Array
    max_new_tokens: int
    end_ids: tuple[int, ...]
    pad_id: int

    def first(self, x: jax.Array, caches: Caches) -> State:
        """The state after the first token of each row, drawn from its prompt's residual stream `x` [b, embed]."""
        rows = self.lengths.shape[0]
        active = self.lengths > 0
        token, logprob = self._choose(x, self.lengths, active)
        return State(
            step=jnp.int32(1),
            token=token,
            position=self.lengths,
            active=active & ~self._ended(token),
            caches=caches,
            out=Generated(
                jnp.full((rows, self.max_new_tokens), self.pad_id, jnp.int32).at[:, 0].set(token),
                jnp.zeros((rows, self.max_new_tokens), jnp.float32).at[:, 0].set(logprob),
            ),
        )

    def unfinished(self, state: State) -> jax.Array:
        """Whether any row has not ended: the loop's condition."""
        return (state.step < self.max_new_tokens) & state.active.any()

    def step(self, state: State) -> State:
        """The state after one more token of each active row: the loop's body."""
        x, caches = self.model.hidden(self.params, self._batch(state), state.caches)
        token, logprob = self._choose(x, state.position + 1, state.active)
        update = lax.dynamic_update_index_in_dim
        return State(
            step=state.step + 1,
            token=token,
            position=state.position + 1,
            active=state.active & ~self._ended(token),
            caches=caches,
            out=Generated(
                update(state.out.tokens, token, state.step, 1), update(state.out.logprobs, logprob, state.step, 1)
            ),
        )

    def _batch(self, state: State) -> Batch:
        """The batch of each row's newest token; a row that has ended writes to the padding page."""
        positions = jnp.where(state.active, state.position, 0)
        return Batch.of_decoding_rows(
            state.token,
            positions,
            state.active,
            (self.table,) * len(self.model.cache_groups),
            PAGE_SIZE,
            execution=self.model.execution,
        )

    def _choose(self, x: jax.Array, positions: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens [b] for `positions` [b], and their log-probabilities [b], from the residual stream `x` [b, embed]."""
        logits = self.model.logits(self.params, x)
        drawn = self.draw(logits, positions)
        scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        own = jnp.take_along_axis(scores, drawn[:, None], axis=1)[:, 0]
        return jnp.where(active, drawn, self.pad_id), jnp.where(active, own, 0.0)

    def _ended(self, token: jax.Array) -> jax.Array:
        # Without end ids, an id that no token has: jax 0.11.2 crashes if an empty array enters a shard_map.
        return (token[:, None] == np.array(self.end_ids or [-1], np.int32)).any(-1)
