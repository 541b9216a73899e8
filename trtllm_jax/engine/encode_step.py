"""The step of a model that computes whole sequences: what the host sends, and what is computed of it.

Axes: r rows of a step, s tokens of a row, padding included, n numbers of a vector.
"""

from typing import Any

import jax

from trtllm_jax.engine.packing import Field, Layout
from trtllm_jax.nn.model import Model


def encode_layout(rows: int, width: int) -> Layout:
    """What the host sends with a step of `rows` sequences of at most `width` tokens."""
    shape = (rows, width)
    return Layout((Field("tokens", shape), Field("types", shape), Field("lengths", (rows,))))


def encode_step(model: Model, layout: Layout, params: Any, packed: jax.Array) -> jax.Array:
    """The vector [r, n] of each sequence; a row without tokens has one that nobody reads."""
    plan = layout.unpack(packed)
    return model.encode(params, plan["tokens"], plan["lengths"], plan["types"])
