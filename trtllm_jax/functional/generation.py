"""Whole generations as one pure function: a prefill, then a loop of single tokens over a paged cache of its own."""

from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from checkpoints.table import expand
from pallas_kernels import sampling
from trtllm_jax.functional.research import Model, checked_lengths, checked_tokens, refuse_explicit_axes
from trtllm_jax.nn.batch import Batch
from trtllm_jax.nn.cache_group import PageArray
from trtllm_jax.nn.forward import hidden_states
from trtllm_jax.nn.layers import activation_dtype

PAGE_SIZE = 32
PAD_ID = -1
"""What follows the last token of a row: no vocabulary has it, so that the tokens that were generated can be counted."""

Caches = tuple[jax.Array, ...]


class Generated(NamedTuple):
    """What a generation gave.

    Attributes:
        tokens: int32 [b, max_new_tokens], an end id included, then padding.
        logprobs: float32 [b, max_new_tokens], of these tokens by the softmax of the logits, before temperature and
            cuts, as the engine reports them; 0 for padding.
    """

    tokens: jax.Array
    logprobs: jax.Array


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
    if not isinstance(model, Model):
        raise ValueError(f"generate_fn.model is a {type(model).__name__}; give the first of what load_model returns")
    if not _is_int(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"generate_fn.max_new_tokens = {max_new_tokens!r}; it must be at least 1, and an integer")
    stated = model.end_ids if end_ids is None else end_ids
    if not _are_ids(stated):
        raise ValueError(f"generate_fn.end_ids = {end_ids!r}; give a list of token ids, () for none")
    # Without ends an id that no token has: jax 0.11.2 dies where an array without elements enters a shard_map.
    ends = np.array(sorted(stated) or [-1], np.int32)
    if kernels is None:
        kernels = jax.default_backend() == "gpu" and jax.device_count() == 1
    plain = not kernels

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
        prompts = checked_tokens(prompts, ndim=2)
        rows, width = prompts.shape
        limit = model.config.max_position
        if width + max_new_tokens > limit:
            raise ValueError(
                f"prompts of {width} tokens and max_new_tokens={max_new_tokens} exceed the model's {limit} positions"
            )
        prompt_of = jnp.full(rows, width) if lengths is None else checked_lengths(lengths, prompts)
        prompt_of = jnp.clip(prompt_of, 0, width).astype(jnp.int32)
        draw = _greedy if key is None else _sampler(key, rows, plain, **settings)

        def choose(x: jax.Array, positions: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Tokens [b] to stand at `positions`, and their log-probabilities, after the residual stream [b, embed]."""
            logits = model.module.head(model.config, params, x, plain=plain)
            drawn = draw(logits, positions)
            scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
            own = jnp.take_along_axis(scores, drawn[:, None], axis=1)[:, 0]
            return jnp.where(active, drawn, pad_id), jnp.where(active, own, 0.0)

        def ended(token: jax.Array) -> jax.Array:
            return (token[:, None] == ends).any(-1)

        x, caches, table = _prefill(model, params, prompts, prompt_of, max_new_tokens, plain)
        active = prompt_of > 0
        token, logprob = choose(x, prompt_of, active)
        first = _State(
            step=jnp.int32(1),
            token=token,
            position=prompt_of,
            active=active & ~ended(token),
            caches=caches,
            out=Generated(
                jnp.full((rows, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(token),
                jnp.zeros((rows, max_new_tokens), jnp.float32).at[:, 0].set(logprob),
            ),
        )

        def unfinished(state: _State) -> jax.Array:
            return (state.step < max_new_tokens) & state.active.any()

        def one_token(state: _State) -> _State:
            positions = jnp.where(state.active, state.position, 0)
            batch = Batch(
                tokens=state.token,
                positions=positions,
                page=jnp.where(state.active, table[jnp.arange(rows), positions // PAGE_SIZE], 0),
                offset=positions % PAGE_SIZE,
                rope_lengths=jnp.maximum(prompt_of, positions + 1),
                page_table=table,
                lengths=jnp.where(state.active, positions + 1, 0),
                starts=None,
                plain=plain,
            )
            x, caches = hidden_states(model.module, model.config, params, batch, state.caches)
            token, logprob = choose(x, state.position + 1, state.active)
            put = lax.dynamic_update_index_in_dim
            return _State(
                step=state.step + 1,
                token=token,
                position=state.position + 1,
                active=state.active & ~ended(token),
                caches=caches,
                out=Generated(
                    put(state.out.tokens, token, state.step, 1), put(state.out.logprobs, logprob, state.step, 1)
                ),
            )

        return lax.while_loop(unfinished, one_token, first).out

    return generate


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _are_ids(value: object) -> bool:
    return isinstance(value, Collection) and all(map(_is_int, value))


class _State(NamedTuple):
    """A step of the loop: the newest token of each row, its place, whether the row goes on, and what was generated."""

    step: jax.Array
    token: jax.Array
    position: jax.Array
    active: jax.Array
    caches: Caches
    out: Generated


def _prefill(
    model: Model, params: Any, prompts: jax.Array, lengths: jax.Array, new: int, plain: bool
) -> tuple[jax.Array, Caches, jax.Array]:
    """The residual stream [b, embed] of each prompt's last token, the caches, and every row's pages [b, p].

    Padding is computed like tokens, from embeddings of zeros, which are finite whatever the weights hold: none sees it,
    and its keys and values are overwritten by what is generated.
    """
    rows, width = prompts.shape
    pages = -(-(width + new) // PAGE_SIZE)
    table = 1 + jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)
    row = jnp.repeat(jnp.arange(rows), width)
    positions = jnp.tile(jnp.arange(width, dtype=jnp.int32), rows)
    batch = Batch(
        tokens=jnp.where(positions < lengths[row], prompts.reshape(-1).astype(jnp.int32), PAD_ID),
        positions=positions,
        page=table[row, positions // PAGE_SIZE],
        offset=positions % PAGE_SIZE,
        rope_lengths=jnp.maximum(lengths[row], positions + 1),
        page_table=table,
        lengths=jnp.full(rows, width, jnp.int32),
        starts=width * jnp.arange(rows + 1, dtype=jnp.int32),
        plain=plain,
    )
    x, caches = hidden_states(model.module, model.config, params, batch, _empty_caches(model, params, 1 + rows * pages))
    return x.reshape(rows, width, -1)[jnp.arange(rows), jnp.maximum(lengths - 1, 0)], caches, table


def _empty_caches(model: Model, params: Any, pages: int) -> Caches:
    """A cache a layer, for the key-value heads that this device holds, padding included."""
    dtype = activation_dtype(params["embed"].dtype)
    heads = _extent_in(params, model, "kv_heads")
    cache_of = {
        layer: jax.tree.map(
            lambda array: jnp.zeros((pages, *array.shape), array.dtype or dtype),
            group.cache.resized({"kv_heads": heads}).page(PAGE_SIZE),
            is_leaf=lambda leaf: isinstance(leaf, PageArray),
        )
        for group in model.module.cache_spec(model.config)
        for layer in group.layers
    }
    return tuple(cache_of[layer] for layer in sorted(cache_of))


def _extent_in(params: Any, model: Model, axis: str) -> int:
    """The extent that a logical axis has in the weights."""
    rows = expand(model.module.table(model.config), model.config.num_layers)
    row = next(row for row in rows if axis in row.axis_names)
    leaf = params
    for name in row.path.split("."):
        leaf = leaf[int(name) if name.isdigit() else name]
    extent: int = leaf.shape[row.axis_names.index(axis)]
    return extent


class _Draw(Protocol):
    def __call__(self, logits: jax.Array, positions: jax.Array) -> jax.Array: ...


def _greedy(logits: jax.Array, positions: jax.Array) -> jax.Array:
    return sampling.greedy(logits)


def _sampler(key: jax.Array, rows: int, plain: bool, **settings: ArrayLike | None) -> _Draw:
    """What draws a token a row by its sampling parameters, from noise that the key and the row's number seed."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    each = {}
    for name, default in defaults.items():
        value = jnp.asarray(default if settings[name] is None else settings[name])
        if value.shape not in ((), (rows,)):
            raise ValueError(f"generate got {name} of shape {value.shape} for {rows} rows; want a number or [{rows}]")
        if name == "top_k" and not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(f"generate got top_k of dtype {value.dtype}; want integers")
        each[name] = jnp.broadcast_to(value.astype(jnp.int32 if name == "top_k" else jnp.float32), (rows,))
    seed = jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row), (2,), jnp.uint32))(jnp.arange(rows))

    def draw(logits: jax.Array, positions: jax.Array) -> jax.Array:
        return sampling.sample(logits, **each, seed=seed, position=positions, implementation="xla" if plain else None)

    return draw
