"""Generation as one pure function, for `jax.jit` or for use inside another function."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Protocol, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from trtllm_jax.functional.arguments import checked_lengths, checked_tokens, refuse_explicit_axes
from trtllm_jax.functional.decode_loop import PAD_ID, DecodeLoop, Generated
from trtllm_jax.functional.draws import greedy, sampler
from trtllm_jax.functional.model import Model
from trtllm_jax.functional.prefill import prefill


class Generate(Protocol):
    """The function that `generate_fn` makes."""

    def __call__(
        self,
        params: Any,
        prompts: ArrayLike,
        lengths: ArrayLike | None = None,
        key: jax.Array | None = None,
        *,
        temperature: ArrayLike | None = None,
        top_k: ArrayLike | None = None,
        top_p: ArrayLike | None = None,
        min_p: ArrayLike | None = None,
    ) -> Generated:
        """Continue every prompt until an end id or `max_new_tokens`.

        Args:
            params: the weights.
            prompts: integers [b, s], padded on the right.
            lengths: integers [b], tokens of each prompt, from 0 (the row generates nothing) to s; None for s.
            key: a `jax.random` key; None for greedy decoding, which takes none of the parameters below. A draw depends
                only on the key, the row's number, the token's position in its sequence and the logits, so not on
                padding.
            temperature: number or [b], 1 by default; 0 takes the likeliest token.
            top_k: integer or [b], how many of the likeliest tokens to keep; 0, the default, keeps all.
            top_p: number or [b], the probability mass to keep; 1, the default, keeps all.
            min_p: number or [b], the least probability of a token as a fraction of the likeliest one's; 0 by default.

        Raises:
            ValueError: a shape or dtype does not fit, the prompts are too long for the model, or a sampling parameter
                is given without a key.
        """


def generate_fn(
    model: Model,
    max_new_tokens: int,
    *,
    end_ids: Collection[int] | None = None,
    pad_id: int = PAD_ID,
    kernels: bool | None = None,
) -> Generate:
    """A pure function that generates, for `jax.jit` or for use inside another function.

    Its loop ends when every row has ended. It allocates its own KV cache, float32 on a CPU and in the weights' dtype
    elsewhere. On a mesh it runs by automatic partitioning, or inside your `shard_map`, which is faster.

    Args:
        model: from `load_model`.
        max_new_tokens: most tokens to generate for a row.
        end_ids: ids that end a row; the model's by default, () for none.
        pad_id: fills a row after its last token.
        kernels: whether a GPU runs this library's kernels, which support neither automatic partitioning nor `jax.vmap`.
            None means True if the process has exactly one device and that is a GPU.

    Raises:
        ValueError: an argument has the wrong type, or max_new_tokens is less than 1.
    """
    _check(model, max_new_tokens, end_ids)
    ends = tuple(sorted(model.end_ids if end_ids is None else end_ids))
    if kernels is None:
        kernels = model.platform.on_gpu and jax.device_count() == 1
    runs = replace(model, execution=replace(model.execution, xla_only=not kernels))

    def generate(
        params: Any,
        prompts: ArrayLike,
        lengths: ArrayLike | None = None,
        key: jax.Array | None = None,
        *,
        temperature: ArrayLike | None = None,
        top_k: ArrayLike | None = None,
        top_p: ArrayLike | None = None,
        min_p: ArrayLike | None = None,
    ) -> Generated:
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        if key is None and (given := [name for name, value in settings.items() if value is not None]):
            raise ValueError(f"generate got {given[0]} without a key: give a jax.random key, or leave {given[0]} out")
        refuse_explicit_axes(params)
        prompts, lengths = _checked_prompts(prompts, lengths, max_new_tokens, model.config.max_position)
        draw = greedy if key is None else sampler(key, len(prompts), runs.execution, **settings)
        x, caches, table = prefill(runs, params, prompts, lengths, max_new_tokens)
        loop = DecodeLoop(runs, params, draw, lengths, table, max_new_tokens, ends, pad_id)
        return lax.while_loop(loop.unfinished, loop.step, loop.first(x, caches)).out

    return generate


def _check(model: object, max_new_tokens: object, end_ids: object) -> None:
    if not isinstance(model, Model):
        raise ValueError(f"generate_fn.model is a {type(model).__name__}; give the Model that load_model returns first")
    if not model.generates:
        raise ValueError("generate_fn.model encodes whole texts and has no next tokens: use Model.encode")
    if not _is_int(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"generate_fn.max_new_tokens = {max_new_tokens!r}; it must be an integer of at least 1")
    if not isinstance(end_ids, Collection | None) or not all(map(_is_int, end_ids or ())):
        raise ValueError(f"generate_fn.end_ids = {end_ids!r}; give a list of token ids, () for none")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _checked_prompts(prompts: ArrayLike, lengths: ArrayLike | None, new: int, most: int) -> tuple[jax.Array, jax.Array]:
    """Prompts [b, s] and their lengths, int32 [b] from 0 to s. ValueError if s + `new` exceeds `most` positions."""
    tokens = checked_tokens(prompts, ndim=2)
    rows, width = tokens.shape
    if width + new > most:
        raise ValueError(f"prompts of {width} tokens and max_new_tokens={new} exceed the model's {most} positions")
    counts = jnp.full(rows, width) if lengths is None else checked_lengths(lengths, tokens)
    return tokens, jnp.clip(counts, 0, width).astype(jnp.int32)
