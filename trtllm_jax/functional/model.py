"""`Model`: a differentiable forward pass, and log-probabilities, as pure functions of a pytree of weights."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from checkpoints.checkpoint import Checkpoint
from trtllm_jax.functional.arguments import checked_lengths, checked_tokens, checked_types, refuse_explicit_axes
from trtllm_jax.nn import model as nn_model
from trtllm_jax.nn.batch import Batch
from trtllm_jax.nn.execution import Execution

LOGITS_AT_ONCE = 1 << 25
"""Logits that `Model.logprobs` computes at a time; a backward pass takes a few times four bytes for each."""


class Scores(NamedTuple):
    """For each of n targets, its log-probability, float32 [n], and whether it is the likeliest token, bool [n]."""

    logprobs: jax.Array
    likeliest: jax.Array


@dataclass(frozen=True)
class Model(nn_model.Model):
    """A model's pure functions of its weights; hashable, so that it may be a static argument of `jax.jit`.

    Calling it, `logprobs` and `score` use XLA without this library's kernels, so that `jax.grad`, `jax.vmap`,
    `jax.jit` and automatic partitioning over a mesh of `AxisType.Auto` axes apply. The engine's programs use the same
    class.

    Attributes:
        module: the architecture, a module of `trtllm_jax.models`.
        config: the architecture's configuration.
        end_ids: the ids that end a sequence, from the checkpoint's configuration and tokenizer.
        attention: "xla", "cudnn" (16-bit on a GPU; neither forward-mode nor second derivatives), or None for cuDNN
            where it is supported.
        checkpoint: the files that the model was opened from.
    """

    end_ids: frozenset[int] = frozenset()
    attention: Literal["xla", "cudnn"] | None = None
    checkpoint: Checkpoint | None = field(default=None, compare=False, repr=False)

    @property
    def files(self) -> Checkpoint:
        """The checkpoint; ValueError if the model was not opened from one."""
        if self.checkpoint is None:
            raise ValueError("this model was not loaded from a checkpoint, so it has no tokenizer and no weights")
        return self.checkpoint

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's transformers tokenizer, loaded at its first use; ValueError if there is none."""
        return self.files.load_tokenizer()

    def __call__(
        self, params: Any, tokens: ArrayLike, lengths: ArrayLike | None = None, *, remat: bool = False
    ) -> jax.Array:
        """The logits of every position, float32 [..., s, vocab]: row i scores the token after tokens 0 to i.

        Args:
            params: the weights from `load_model`, or trained weights of the same structure.
            tokens: integers [..., s], padded on the right; an id outside the vocabulary has an embedding of zeros.
            lengths: integers [...], tokens of each sequence without padding; None for all. They matter only to ropes
                that depend on a sequence's length (dynamic), because attention is causal and padding is on the right.
            remat: rematerialise each layer's activations in the backward pass instead of storing them.

        Raises:
            ValueError: the shapes or dtypes do not fit, or the weights are on a mesh of explicit axes.
        """
        x = self._dense(params, tokens, lengths, remat)
        return self._scores(params, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    def encode(
        self,
        params: Any,
        tokens: ArrayLike,
        lengths: ArrayLike | None = None,
        token_types: ArrayLike | None = None,
    ) -> jax.Array:
        """One vector for each sequence, float32 [..., n]: an embedding, pooled as the model states; class logits.

        Args:
            params, tokens, lengths: as for a call; no token sees padding.
            token_types: integers like `tokens`, the segments of pairs of texts; None where there is one.

        Raises:
            ValueError: the shapes or dtypes do not fit, or the weights are on a mesh of explicit axes.
        """
        flat, length_of = self._checked(params, tokens, lengths)
        types = None
        if token_types is not None:
            types = checked_types(token_types, jnp.asarray(tokens)).reshape(flat.shape).astype(jnp.int32)
        found = nn_model.Model.encode(replace(self, execution=self._xla_execution), params, flat, length_of, types)
        return found.reshape(*jnp.shape(tokens)[:-1], -1)

    def logprobs(
        self, params: Any, tokens: ArrayLike, lengths: ArrayLike | None = None, *, remat: bool = False
    ) -> jax.Array:
        """The log-probability of every token given those before it, float32 [..., s]; their sum is the sequence's.

        It is 0 for the first token, for padding and for negative ids, with which `generate_fn` pads; and NaN for ids
        beyond the vocabulary. Arguments and errors are those of a call. Logits are computed in parts, and again in the
        backward pass, so that they are never all in memory.
        """
        x = self._dense(params, tokens, lengths, remat)
        tokens = jnp.asarray(tokens)
        lead, (width, embed) = tokens.shape[:-1], x.shape[-2:]
        rows = tokens.size // width
        part = min(max(LOGITS_AT_ONCE // (rows * self.config.vocab), 1), max(width - 1, 1))
        parts = -(-(width - 1) // part)
        unused = parts * part - (width - 1)

        @jax.checkpoint
        def of_part(part_of: tuple[jax.Array, jax.Array]) -> jax.Array:
            before, chosen = part_of
            logits = self._scores(params, before.reshape(-1, embed)).reshape(*chosen.shape, -1)
            own = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
            return own - jax.nn.logsumexp(logits, axis=-1)

        def by_part(array: jax.Array) -> jax.Array:
            padded = jnp.pad(array, [(0, 0), (0, unused), *[(0, 0)] * (array.ndim - 2)])
            return jnp.moveaxis(padded.reshape(rows, parts, part, *array.shape[2:]), 1, 0)

        flat = tokens.reshape(rows, width)
        chosen = lax.map(of_part, (by_part(x.reshape(rows, width, embed)[:, :-1]), by_part(flat[:, 1:])))
        found = jnp.moveaxis(chosen, 0, 1).reshape(rows, -1)[:, : width - 1]
        found = jnp.pad(found, ((0, 0), (1, 0))).reshape(*lead, width)
        real = tokens >= 0 if lengths is None else (jnp.arange(width) < jnp.asarray(lengths)[..., None]) & (tokens >= 0)
        return jnp.where(real, found, 0.0)

    def score(
        self, params: Any, tokens: ArrayLike, places: ArrayLike, targets: ArrayLike, lengths: ArrayLike | None = None
    ) -> Scores:
        """Score each of `targets` as the token after one position of `tokens`; computes logits only there.

        Args:
            params, tokens, lengths: as for a call.
            places: integers [n], indices into the flattened `tokens`.
            targets: integers [n], ids of the vocabulary.

        Raises:
            ValueError: the shapes or dtypes do not fit, or the weights are on a mesh of explicit axes.
        """
        places, targets = jnp.asarray(places), jnp.asarray(targets)
        if places.ndim != 1 or places.shape != targets.shape or places.size == 0:
            raise ValueError(f"places are {list(places.shape)} and targets {list(targets.shape)}; want both [n], n > 0")
        x = self._dense(params, tokens, lengths, remat=False)
        count = places.size
        part = min(max(LOGITS_AT_ONCE // self.config.vocab, 1), count)

        def of_part(places_and_targets: tuple[jax.Array, jax.Array]) -> Scores:
            places, targets = places_and_targets
            logits = self._scores(params, x.reshape(-1, x.shape[-1])[places])
            own = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
            return Scores(own - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1) == targets)

        def by_part(array: jax.Array) -> jax.Array:
            return jnp.pad(array, (0, -count % part)).reshape(-1, part)

        found = lax.map(of_part, (by_part(places), by_part(targets)))
        return Scores(*(array.reshape(-1)[:count] for array in found))

    def _dense(self, params: Any, tokens: ArrayLike, lengths: ArrayLike | None, remat: bool) -> jax.Array:
        """The residual stream [..., s, embed] after the last layer, for the logits of next tokens."""
        if not self.generates:
            raise ValueError("this model has no logits of next tokens: it encodes whole texts, with Model.encode")
        flat, length_of = self._checked(params, tokens, lengths)
        batch = Batch.of_sequences(flat, length_of, self._xla_execution)
        x, _ = self.hidden(params, batch, remat=remat)
        return x.reshape(*jnp.shape(tokens), -1)

    @staticmethod
    def _checked(params: Any, tokens: ArrayLike, lengths: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
        """Tokens [b, s] and lengths [b], int32."""
        tokens = checked_tokens(tokens)
        refuse_explicit_axes(params)
        *lead, width = tokens.shape
        length_of = jnp.full(lead, width) if lengths is None else checked_lengths(lengths, tokens)
        return tokens.reshape(-1, width).astype(jnp.int32), length_of.reshape(-1).astype(jnp.int32)

    def _scores(self, params: Any, x: jax.Array) -> jax.Array:
        scores: jax.Array = self.module.head(self.config, params, x, self._xla_execution)
        return scores.astype(jnp.float32)

    @property
    def _xla_execution(self) -> Execution:
        return replace(self.execution, xla_only=True, attention=self.attention)
