"""Whole generations as one pure function, to jit or to call inside a program of one's own."""

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
            key: a `jax.random` key. None for greedy decoding, which takes none of the parameters below. A draw depends
                on the key, the row's number, the token's place in its sequence and the logits only, so not on padding.
            temperature: numbers or [b], 1 by default; 0 takes the likeliest token.
            top_k: integers or [b], how many of the likeliest tokens to keep; 0, the default, keeps all.
            top_p: numbers or [b], the share of the probability to keep; 1, the default, keeps all.
            min_p: numbers or [b], keeps tokens at least so many times as likely as the likeliest; 0 by default.

        Raises:
            ValueError: the shapes do not fit each other or the model.
        """


def generate_fn(
    model: Model,
    max_new_tokens: int,
    *,
    end_ids: Collection[int] | None = None,
    pad_id: int = PAD_ID,
    kernels: bool | None = None,
) -> Generate:
    """A pure function that generates: jit it, or call it inside a program of your own.

    Its loop ends when every row has ended. The cache is its own, float32 on a CPU and of the weights' dtype elsewhere,
    and is freed with it. With a mesh it runs by automatic partitioning, or inside your `shard_map`, which is faster.

    Args:
        model: as `load_model` gives it.
        max_new_tokens: how many tokens a row gains at most.
        end_ids: ids that end a row; the model's by default, () for none.
        pad_id: what follows a row's last token.
        kernels: whether a GPU runs our kernels, which automatic partitioning and `jax.vmap` do not take. None for yes
            where the process has one GPU and no other device.

    Raises:
        ValueError: an argument is of another kind, or max_new_tokens is less than 1.
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
            raise ValueError(f"generate got {given[0]} and no key: give a jax.random key, or leave {given[0]} out")
        refuse_explicit_axes(params)
        prompts, lengths = _checked_prompts(prompts, lengths, max_new_tokens, model.config.max_position)
        draw = greedy if key is None else sampler(key, len(prompts), runs.execution, **settings)
        x, caches, table = prefill(runs, params, prompts, lengths, max_new_tokens)
        loop = DecodeLoop(runs, params, draw, lengths, table, max_new_tokens, ends, pad_id)
        return lax.while_loop(loop.unfinished, loop.step, loop.first(x, caches)).out

    return generate


def _check(model: object, max_new_tokens: object, end_ids: object) -> None:
    if not isinstance(model, Model):
        raise ValueError(f"generate_fn.model is a {type(model).__name__}; give the first of what load_model returns")
    if not _is_int(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"generate_fn.max_new_tokens = {max_new_tokens!r}; it must be at least 1, and an integer")
    if not isinstance(end_ids, Collection | None) or not all(map(_is_int, end_ids or ())):
        raise ValueError(f"generate_fn.end_ids = {end_ids!r}; give a list of token ids, () for none")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _checked_prompts(prompts: ArrayLike, lengths: ArrayLike | None, new: int, most: int) -> tuple[jax.Array, jax.Array]:
    """Prompts [b, s] and the tokens of each, int32 [b] from 0 to s, that leave room for `new` tokens among `most`."""
    tokens = checked_tokens(prompts, ndim=2)
    rows, width = tokens.shape
    if width + new > most:
        raise ValueError(f"prompts of {width} tokens and max_new_tokens={new} exceed the model's {most} positions")
    counts = jnp.full(rows, width) if lengths is None else checked_lengths(lengths, tokens)
    return tokens, jnp.clip(counts, 0, width).astype(jnp.int32)
