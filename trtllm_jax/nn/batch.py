"""The record that tells a model's layers which tokens they see and where their keys and values live."""

from typing import Literal

import flax.struct
import jax

from pallas_kernels.attention import Rotation

Cache = jax.Array | None
"""One layer's cache; None where there is none."""


@flax.struct.dataclass
class Batch:
    """A flat batch of tokens over a paged cache, or without one; t tokens, r rows (sequences), p pages of a row.

    Without a cache (page, offset and page_table None) each row owns t / r consecutive tokens, its whole sequence.

    Attributes:
        tokens: int32 [t], the ids; padding may hold any valid id.
        positions: int32 [t], each token's place in its sequence.
        page: int32 [t], the page that takes the token's key and value; 0 for padding.
        offset: int32 [t], the place within that page.
        rope_lengths: int32 [t], tokens the sequence had when the token entered it (dynamic rope depends on it).
        page_table: int32 [r, p].
        lengths: int32 [r], tokens of each row in the cache, this batch's included; 0 for padding.
        starts: int32 [r + 1], where each row's tokens begin; None when every row owns one token (decoding).
        rotations: one of each rope the model names in `ropes`; the forward pass fills them in.
        plain: whether everything is computed by XLA alone, which can be differentiated, mapped and partitioned; static.
        attention: what computes attention without a cache, as `pallas_kernels.attention.attend` takes it; static.
    """

    tokens: jax.Array
    positions: jax.Array
    page: jax.Array | None
    offset: jax.Array | None
    rope_lengths: jax.Array
    page_table: jax.Array | None
    lengths: jax.Array
    starts: jax.Array | None
    rotations: tuple[Rotation, ...] = ()
    plain: bool = flax.struct.field(pytree_node=False, default=False)
    attention: Literal["xla", "cudnn"] | None = flax.struct.field(pytree_node=False, default=None)
