"""The loop of a generation: a token a row from the residual stream, then a step of every row, until all have ended."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trtllm_jax.functional.draws import Draw
from trtllm_jax.functional.model import Model
from trtllm_jax.functional.prefill import PAGE_SIZE
from trtllm_jax.nn.batch import Batch
from trtllm_jax.nn.model import Caches

PAD_ID = -1
"""What follows the last token of a row: no vocabulary has it, so that the tokens that were generated can be counted."""


class Generated(NamedTuple):
    """What a generation gave.

    Attributes:
        tokens: int32 [b, max_new_tokens], an end id included, then padding.
        logprobs: float32 [b, max_new_tokens], of these tokens by the softmax of the logits, before temperature and
            cuts, as the engine reports them; 0 for padding.
    """

    tokens: jax.Array
    logprobs: jax.Array


class State(NamedTuple):
    """A step of the loop: the newest token of each row, its place, whether the row goes on, and what was generated."""

    step: jax.Array
    token: jax.Array
    position: jax.Array
    active: jax.Array
    caches: Caches
    out: Generated


@dataclass(frozen=True)
class DecodeLoop:
    """What every step of one generation shares.

    Attributes:
        model: the pure functions.
        params: the weights.
        draw: what chooses a token a row.
        lengths: int32 [b], tokens of each prompt; a row without any generates nothing.
        table: int32 [b, p], every row's pages.
        max_new_tokens: how many tokens a row gains at most.
        end_ids: ids that end a row.
        pad_id: what follows a row's last token.
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
        """The state with the first token of each row, after the residual stream [b, embed] of its prompt."""
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
        """Whether a row goes on."""
        return (state.step < self.max_new_tokens) & state.active.any()

    def step(self, state: State) -> State:
        """The state with another token of each row that goes on."""
        x, caches = self.model.hidden(self.params, self._batch(state), state.caches)
        token, logprob = self._choose(x, state.position + 1, state.active)
        put = lax.dynamic_update_index_in_dim
        return State(
            step=state.step + 1,
            token=token,
            position=state.position + 1,
            active=state.active & ~self._ended(token),
            caches=caches,
            out=Generated(put(state.out.tokens, token, state.step, 1), put(state.out.logprobs, logprob, state.step, 1)),
        )

    def _batch(self, state: State) -> Batch:
        """The newest token of each row; a row that has ended writes to the page of padding."""
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
        """Tokens [b] to stand at `positions`, and their log-probabilities, after the residual stream [b, embed]."""
        logits = self.model.logits(self.params, x)
        drawn = self.draw(logits, positions)
        scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        own = jnp.take_along_axis(scores, drawn[:, None], axis=1)[:, 0]
        return jnp.where(active, drawn, self.pad_id), jnp.where(active, own, 0.0)

    def _ended(self, token: jax.Array) -> jax.Array:
        # Without ends an id that no token has: jax 0.11.2 dies where an array without elements enters a shard_map.
        return (token[:, None] == np.array(self.end_ids or [-1], np.int32)).any(-1)
