"""Penalties, bans and bias on the device: what each sequence's tokens are, and how they change its next logits.

Equal to `logit_edits.LogitEdits.apply`, for those of them that need the host for nothing but their beginning. Axes:
s slots of the device state, a rows that are changed, v vocabulary, l tokens of the longest sequence.
"""

from dataclasses import replace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trtllm_jax.engine.packing import Field, Layout
from trtllm_jax.engine.request import MAX_BIASED, MAX_NGRAM, Request

_MOST = int(np.iinfo(np.uint16).max)


@flax.struct.dataclass
class Penalties:
    """What changes the logits of the sequence in each slot; of a sequence without changes it holds anything.

    Attributes:
        repetition: float32 [s], and so are `presence` and `frequency`; as in `LogitEdits`.
        least: int32 [s], tokens of the sequence before which no end may be drawn.
        ngram: int32 [s], tokens of the shortest sequence that may not occur twice; 0 for none.
        biased: int32 [s, MAX_BIASED], ids, v where unused.
        bias: float32 [s, MAX_BIASED], what is added; minus infinity for ids that may not be drawn.
        counts: uint16 [s, v], 0 for an id that did not occur, else 1 more than the times that count.
        history: int32 [s, l], the tokens.
    """

    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    least: jax.Array
    ngram: jax.Array
    biased: jax.Array
    bias: jax.Array
    counts: jax.Array
    history: jax.Array

    @classmethod
    def empty(cls, slots: int, vocab: int, length: int) -> "Penalties":
        """Room for `slots` sequences of up to `length` tokens."""
        floats, integers = jnp.zeros(slots, jnp.float32), jnp.zeros(slots, jnp.int32)
        return cls(
            repetition=floats,
            presence=floats,
            frequency=floats,
            least=integers,
            ngram=integers,
            biased=jnp.full((slots, MAX_BIASED), vocab, jnp.int32),
            bias=jnp.zeros((slots, MAX_BIASED), jnp.float32),
            counts=jnp.zeros((slots, vocab), jnp.uint16),
            history=jnp.zeros((slots, length), jnp.int32),
        )

    def changed(
        self, logits: jax.Array, slots: jax.Array, lengths: jax.Array, ends: jax.Array, *, decides: bool
    ) -> jax.Array:
        """Logits [a, v] in float32 of sequences in `slots` [a] of `lengths` [a] tokens, that `ends` [a, e] end.

        Where the program `decides` when it runs, it looks for repetitions only if a sequence asks for it.
        """
        row = jnp.arange(logits.shape[0])[:, None]
        logits = logits.at[row, self.biased[slots]].add(self.bias[slots], mode="drop")
        logits = self._penalised(logits, slots)
        early = (lengths < self.least[slots])[:, None] & (ends >= 0)
        logits = _banned_unless_all(logits, jnp.where(early, ends, logits.shape[1]))

        def without_repeats(logits: jax.Array) -> jax.Array:
            return _banned_unless_all(logits, self._repeating(slots, lengths, logits.shape[1]))

        if not decides:
            return without_repeats(logits)
        return lax.cond((self.ngram[slots] > 0).any(), without_repeats, lambda logits: logits, logits)

    def _penalised(self, logits: jax.Array, slots: jax.Array) -> jax.Array:
        counts = self.counts[slots]
        repetition, presence, frequency = (
            leaf[slots][:, None] for leaf in (self.repetition, self.presence, self.frequency)
        )
        repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
        times = counts.astype(jnp.float32) - 1
        subtracted = jnp.where(times > 0, presence + frequency * times, 0)
        return jnp.where(counts > 0, repeated - subtracted, logits)

    def _repeating(self, slots: jax.Array, lengths: jax.Array, nothing: int) -> jax.Array:
        """Ids [a, l] that would complete an n-gram for the second time; `nothing` elsewhere."""
        history, size, length = self.history[slots], self.ngram[slots][:, None], lengths[:, None]
        place = jnp.arange(history.shape[1])
        repeats = (size > 0) & (place >= size - 1) & (place < length)
        for back in range(1, MAX_NGRAM):
            newest = jnp.take_along_axis(history, jnp.maximum(length - back, 0), axis=1)
            repeats &= (back >= size) | (jnp.roll(history, back, axis=1) == newest)
        return jnp.where(repeats, history, nothing)

    def noted(self, slots: jax.Array, positions: jax.Array, tokens: jax.Array) -> "Penalties":
        """With `tokens` [a] at `positions` [a] of the sequences in `slots` [a]; slots beyond the last are ignored."""
        before = self.counts.at[slots, tokens].get(mode="fill", fill_value=0)
        counted = jnp.minimum(jnp.maximum(before, 1), _MOST - 1) + jnp.uint16(1)
        return replace(
            self,
            counts=self.counts.at[slots, tokens].set(counted, mode="drop"),
            history=self.history.at[slots, positions].set(tokens, mode="drop"),
        )


def _banned_unless_all(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Logits [a, v] without `ids` [a, n] (v and beyond are none), as they are in rows that this would leave nothing."""
    row = jnp.arange(logits.shape[0])[:, None]
    banned = logits.at[row, ids].set(-jnp.inf, mode="drop")
    return jnp.where((banned > -jnp.inf).any(-1, keepdims=True), banned, logits)


def begin_layout(length: int) -> Layout:
    """What the host sends when a sequence with penalties takes a slot, its tokens among it."""
    return Layout(
        (
            Field("slot", ()),
            Field("length", ()),
            Field("ignored", ()),
            Field("repetition", (), np.float32),
            Field("presence", (), np.float32),
            Field("frequency", (), np.float32),
            Field("least", ()),
            Field("ngram", ()),
            Field("num_biased", ()),
            Field("biased", (MAX_BIASED,)),
            Field("bias", (MAX_BIASED,), np.float32),
            Field("tokens", (length,)),
        )
    )


def pack_begin(layout: Layout, request: Request) -> np.ndarray:
    """That of one sequence, all of whose tokens the host knows."""
    edits = request.edits
    assert edits is not None
    bans = np.array([token for (token,) in edits.bad], np.int32)
    added = np.zeros(0, np.float32) if edits.bias is None else edits.bias[edits.biased]
    return layout.pack(
        slot=np.array(request.slot),
        length=np.array(request.total),
        ignored=np.array(min(edits.ignored_prompt, len(request.prompt))),
        repetition=np.array(edits.repetition),
        presence=np.array(edits.presence),
        frequency=np.array(edits.frequency),
        least=np.array(len(request.prompt) + edits.min_tokens),
        ngram=np.array(edits.no_repeat_ngram),
        num_biased=np.array(edits.biased.size + bans.size),
        biased=np.concatenate([edits.biased, bans]),
        bias=np.concatenate([added, np.full(bans.size, -np.inf, np.float32)]),
        tokens=np.array(request.tokens(0, request.total), np.int32),
    )


def begin(layout: Layout, penalties: Penalties, packed: jax.Array) -> Penalties:
    """The penalties with one slot for a new sequence."""
    new = layout.unpack(packed)
    slot, tokens, vocab = new["slot"], new["tokens"], penalties.counts.shape[1]
    place = jnp.arange(tokens.shape[0])
    known = jnp.where(place < new["length"], tokens, vocab)
    occurred = jnp.zeros(vocab, jnp.int32).at[known].max(1, mode="drop")
    times = jnp.zeros(vocab, jnp.int32).at[jnp.where(place >= new["ignored"], known, vocab)].add(1, mode="drop")
    used = jnp.arange(MAX_BIASED) < new["num_biased"]
    return Penalties(
        **{
            name: getattr(penalties, name).at[slot].set(new[name])
            for name in ("repetition", "presence", "frequency", "least", "ngram", "bias")
        },
        biased=penalties.biased.at[slot].set(jnp.where(used, new["biased"], vocab)),
        counts=penalties.counts.at[slot].set(jnp.minimum(occurred + times, _MOST).astype(jnp.uint16)),
        history=penalties.history.at[slot].set(tokens),
    )
