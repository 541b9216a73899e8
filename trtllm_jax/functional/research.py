"""A model without an engine: a differentiable forward pass, and log-probabilities, over a pytree of weights."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.typing import ArrayLike

import sharding
from checkpoints.checkpoint import Checkpoint, open_checkpoint
from trtllm_jax.common.strict_model import DType, StrictModel
from trtllm_jax.functional.loading import load_weights
from trtllm_jax.models import architecture
from trtllm_jax.nn.batch import Batch
from trtllm_jax.nn.dtypes import weight_dtype
from trtllm_jax.nn.forward import hidden_states
from trtllm_jax.text.tokenizer_loading import stated_end_ids

LOGITS_AT_ONCE = 1 << 25
"""Logits that `Model.logprobs` holds at a time, of which a backward pass needs a few times four bytes each."""


class Scores(NamedTuple):
    """For each of n targets its log-probability, float32 [n], and whether it is the likeliest token, bool [n]."""

    logprobs: jax.Array
    likeliest: jax.Array


@dataclass(frozen=True)
class Model:
    """A model's pure functions of its weights; hashable, so that it may be a static argument of `jax.jit`.

    Everything is computed in plain XLA: `jax.grad`, `jax.vmap`, `jax.jit` and automatic partitioning over a mesh of
    `AxisType.Auto` axes apply.

    Attributes:
        module: the architecture, a file in `trtllm_jax/models`.
        config: its facts.
        end_ids: the ids that end a sequence, as the checkpoint states or names them.
        attention: "xla", "cudnn" (16-bit on a GPU; no forward-mode and no second derivative), or None: cuDNN where it
            can.
        checkpoint: the files it came from.
    """

    module: ModuleType
    config: Any
    end_ids: frozenset[int] = frozenset()
    attention: Literal["xla", "cudnn"] | None = None
    checkpoint: Checkpoint | None = field(default=None, compare=False, repr=False)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's transformers tokenizer, read when it is first used; ValueError where there is none."""
        if self.checkpoint is None:
            raise ValueError("this model was not loaded from a checkpoint, so it has no tokenizer")
        return self.checkpoint.load_tokenizer()

    def __call__(
        self, params: Any, tokens: ArrayLike, lengths: ArrayLike | None = None, *, remat: bool = False
    ) -> jax.Array:
        """The logits of every position, float32 [..., s, vocab]: row i scores the token after tokens 0 to i.

        Args:
            params: the weights, as `load_model` gave them, or trained since.
            tokens: integers [..., s], padded on the right; an id outside the vocabulary has an embedding of zeros.
            lengths: integers [...], tokens of each sequence that are not padding; None for all. No token sees the
                padding behind it, so only ropes that depend on a sequence's length (dynamic) look at them.
            remat: a backward pass computes each layer again instead of keeping what is inside it.

        Raises:
            ValueError: the shapes or dtypes do not fit, or the weights lie on a mesh of explicit axes.
        """
        x = self._hidden(params, tokens, lengths, remat)
        return self._logits(params, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    def logprobs(
        self, params: Any, tokens: ArrayLike, lengths: ArrayLike | None = None, *, remat: bool = False
    ) -> jax.Array:
        """The log-probability of every token after those before it, float32 [..., s]; their sum is the sequence's.

        0 for the first token, which nothing predicts, for padding, and for negative ids, which `generate_fn` pads with;
        NaN for ids beyond the vocabulary. Arguments and errors as for a call; logits are made a part at a time, and
        again in a backward pass, so that they never are in memory together.
        """
        x = self._hidden(params, tokens, lengths, remat)
        tokens = jnp.asarray(tokens)
        lead, (width, embed) = tokens.shape[:-1], x.shape[-2:]
        rows = tokens.size // width
        part = min(max(LOGITS_AT_ONCE // (rows * self.config.vocab), 1), max(width - 1, 1))
        parts = -(-(width - 1) // part)
        unused = parts * part - (width - 1)

        @jax.checkpoint
        def of_part(part_of: tuple[jax.Array, jax.Array]) -> jax.Array:
            before, chosen = part_of
            logits = self._logits(params, before.reshape(-1, embed)).reshape(*chosen.shape, -1)
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
        """How likely each of `targets` is as the token after one place of `tokens`; only these places have logits made.

        Args:
            params, tokens, lengths: as for a call.
            places: integers [n], indices into `tokens` as if it were flat.
            targets: integers [n], ids of the vocabulary.

        Raises:
            ValueError: the shapes or dtypes do not fit, or the weights lie on a mesh of explicit axes.
        """
        places, targets = jnp.asarray(places), jnp.asarray(targets)
        if places.ndim != 1 or places.shape != targets.shape or places.size == 0:
            raise ValueError(f"places are {list(places.shape)} and targets {list(targets.shape)}; want both [n], n > 0")
        x = self._hidden(params, tokens, lengths, remat=False)
        count = places.size
        part = min(max(LOGITS_AT_ONCE // self.config.vocab, 1), count)

        def of_part(places_and_targets: tuple[jax.Array, jax.Array]) -> Scores:
            places, targets = places_and_targets
            logits = self._logits(params, x.reshape(-1, x.shape[-1])[places])
            own = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
            return Scores(own - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1) == targets)

        def by_part(array: jax.Array) -> jax.Array:
            return jnp.pad(array, (0, -count % part)).reshape(-1, part)

        found = lax.map(of_part, (by_part(places), by_part(targets)))
        return Scores(*(array.reshape(-1)[:count] for array in found))

    def weight_dtype(self, params: Any) -> jnp.dtype:
        """The dtype of the weights, but for those that have one of their own whatever the model's."""
        return weight_dtype(self.module.table(self.config), params)

    def _hidden(self, params: Any, tokens: ArrayLike, lengths: ArrayLike | None, remat: bool) -> jax.Array:
        """The residual stream [..., s, embed] after the last layer."""
        tokens = checked_tokens(tokens)
        refuse_explicit_axes(params)
        *lead, width = tokens.shape
        length_of = jnp.full(lead, width) if lengths is None else checked_lengths(lengths, tokens)
        flat = tokens.reshape(-1, width).astype(jnp.int32)
        batch = Batch.of_sequences(flat, length_of.reshape(-1).astype(jnp.int32), self.attention)
        none = (None,) * len(params["layers"])
        x, _ = hidden_states(self.module, self.config, params, batch, none, remat=remat)
        return x.reshape(*lead, width, -1)

    def _logits(self, params: Any, x: jax.Array) -> jax.Array:
        scores: jax.Array = self.module.head(self.config, params, x, xla_only=True)
        return scores.astype(jnp.float32)


class LoadModelArgs(StrictModel, owner="load_model"):
    """The arguments of `load_model` that can be wrong without a look at the devices."""

    model: str | Path
    dtype: DType = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    revision: str | None = None
    attention: Literal["xla", "cudnn"] | None = None


def load_model(
    model: str | Path,
    *,
    dtype: DType = "auto",
    mesh: Mesh | None = None,
    load_format: Literal["auto", "dummy"] = "auto",
    revision: str | None = None,
    attention: Literal["xla", "cudnn"] | None = None,
) -> tuple[Model, Any]:
    """A model's pure functions and its weights, without an engine.

    The weights are a dict of arrays, the layers a tuple of dicts. They are the arrays that `LLM` would hold: nothing
    of the files' layout is left to undo.

    Args:
        model: a folder with a Hugging Face checkpoint, a .gguf file, or the name of a model on the hub.
        dtype: of the weights; "auto" as for `LLM`.
        mesh: where the weights go: heads, feed-forward channels and vocabulary are split over its axis "tp", padded
            where that does not divide them, and everything is repeated over its other axes. None for one device, from
            where `jax.device_put` moves them to any mesh.
        load_format: "dummy" for random weights.
        revision: of a model on the hub.
        attention: as `Model.attention`.

    Raises:
        ValueError: an argument is wrong, or the checkpoint is; names it, its value, the remedy.
        MemoryError: the weights do not fit the devices.
    """
    args = LoadModelArgs(model=model, dtype=dtype, load_format=load_format, revision=revision, attention=attention)
    if mesh is not None and not _takes_weights(mesh):
        raise ValueError(
            f"load_model.mesh = {mesh} must be a Mesh that has an axis named 'tp', and whose axes are all automatic: "
            "jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names)), or place the "
            "weights yourself without mesh"
        )
    found = open_model(args.model, revision=args.revision, attention=args.attention)
    assert found.checkpoint is not None
    params = load_weights(
        found.checkpoint,
        found.module,
        found.config,
        mesh or sharding.make_mesh(),
        dtype=args.dtype,
        load_format=args.load_format,
    )
    return found, params


def open_model(
    model: str | Path, *, revision: str | None = None, attention: Literal["xla", "cudnn"] | None = None
) -> Model:
    """A model's pure functions without weights, for instance for those of an engine: `LLM.params`.

    Arguments and errors as for `load_model`.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    module = architecture(checkpoint.config)
    config = module.Config.from_hf(checkpoint.config)
    return Model(module, config, stated_end_ids(checkpoint), attention, checkpoint)


def _takes_weights(mesh: object) -> bool:
    return isinstance(mesh, Mesh) and "tp" in mesh.shape and set(mesh.axis_types) == {AxisType.Auto}


def checked_tokens(tokens: ArrayLike, ndim: int | None = None) -> jax.Array:
    """`tokens` as an array of integers [..., s] of at least one token, of `ndim` axes if that is given."""
    array = jnp.asarray(tokens)
    if array.ndim < 1 or array.size == 0 or (ndim is not None and array.ndim != ndim):
        wanted = "[..., tokens]" if ndim is None else "[rows, tokens]"
        raise ValueError(f"tokens have the shape {array.shape}; want {wanted}, none of them 0")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"tokens have the dtype {array.dtype}; want integers")
    return array


def checked_lengths(lengths: ArrayLike, tokens: jax.Array) -> jax.Array:
    """`lengths` as an array of integers, one a sequence of `tokens` [..., s]."""
    array = jnp.asarray(lengths)
    if array.shape != tokens.shape[:-1] or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"lengths are {array.dtype}{list(array.shape)} for tokens {list(tokens.shape)}; "
            f"want integers {list(tokens.shape[:-1])}"
        )
    return array


def refuse_explicit_axes(params: Any) -> None:
    """ValueError if a weight lies on a mesh of explicit axes, where operations want shardings that no layer names."""
    for leaf in jax.tree.leaves(params):
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            raise ValueError(
                f"the weights lie on a mesh with explicit axes, {dict(mesh.shape)}: make it with "
                "axis_types=(jax.sharding.AxisType.Auto,) * n, which jax.make_mesh does not do by itself"
            )
