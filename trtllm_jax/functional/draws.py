"""How a generation draws the next token of each row from its logits."""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import sampling
from trtllm_jax.nn.execution import Execution


class Draw(Protocol):
    """A function that draws the next token of each row."""

    def __call__(self, logits: jax.Array, positions: jax.Array) -> jax.Array:
        """Tokens int32 [b] for `positions` [b], from logits [b, vocab]."""


def greedy(logits: jax.Array, positions: jax.Array) -> jax.Array:
    """The likeliest token of each row."""
    return sampling.greedy(logits)


def sampler(key: jax.Array, rows: int, how: Execution, **settings: ArrayLike | None) -> Draw:
    """A function that samples each row by its parameters, with noise seeded by the key and the row's number.

    ValueError if a parameter is neither a number nor of shape [rows], or if top_k is not an integer.
    """
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
        return sampling.sample(
            logits, **each, seed=seed, position=positions, implementation=how.implementation, platform=how.platform
        )

    return draw
