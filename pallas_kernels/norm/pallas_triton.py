"""Root-mean-square normalisation, optionally of a sum, as one Pallas kernel on Triton.

XLA compiles it to two or three kernels, each of which takes longer to launch than to run in a decode step.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.norm.record import Norm

ELEMENTS_A_WARP = 1024


def normalise(x: jax.Array, norm: Norm, *, interpret: bool = False) -> jax.Array:
    """`pallas_kernels.norm.normalise`, with one program per row."""
    (normed,) = _call((x,), norm, None, interpret)
    return normed


def add_and_normalise(
    x: jax.Array, added: jax.Array, norm: Norm, added_norm: Norm | None = None, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`pallas_kernels.norm.add_and_normalise`, with one program per row."""
    total, normed = _call((x, added), norm, added_norm, interpret)
    return total, normed


def _call(summands: tuple[jax.Array, ...], norm: Norm, added_norm: Norm | None, interpret: bool) -> list[jax.Array]:
    """The normalised sum; if there are two summands, the sum itself comes first, and the second may be normalised."""
    shape, dtype = summands[0].shape, summands[0].dtype
    width = shape[-1]
    rows = [summand.reshape(-1, width) for summand in summands]
    norms = [norm] if added_norm is None else [norm, added_norm]
    row, vector = pl.BlockSpec((None, width), lambda index: (index, 0)), pl.BlockSpec((width,), lambda index: (0,))
    channels = _Channels(width, pl.next_power_of_2(width))
    kernel = partial(_kernel, channels=channels, summands=len(rows), norms=[_Scaling(n.eps, n.offset) for n in norms])
    num_warps = min(8, max(1, channels.padded // ELEMENTS_A_WARP))
    results: list[jax.Array] = pl.pallas_call(
        kernel,
        grid=(rows[0].shape[0],),
        in_specs=[*[row] * len(rows), *[vector] * len(norms)],
        out_specs=[row] * len(rows),
        out_shape=[jax.ShapeDtypeStruct(rows[0].shape, dtype)] * len(rows),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="rms_norm",
    )(*rows, *[each.weight for each in norms])
    return [result.reshape(shape) for result in results]


class _Channels(NamedTuple):
    """The channels of a row, padded to a power of two."""

    width: int
    padded: int

    def load(self, ref: Any) -> jax.Array:
        """A row or a weight, with zeros for padding."""
        place = jnp.arange(self.padded)
        mask, other = (None, None) if self.padded == self.width else (place < self.width, 0)
        return plgpu.load(ref.at[place], mask=mask, other=other)

    def store(self, ref: Any, row: jax.Array) -> None:
        """Store a row in the dtype that it is kept in."""
        place = jnp.arange(self.padded)
        plgpu.store(
            ref.at[place], row.astype(ref.dtype), mask=None if self.padded == self.width else place < self.width
        )


class _Scaling(NamedTuple):
    """What a norm is besides its weight."""

    eps: float
    offset: float

    def of(self, row: jax.Array, weight_ref: Any, channels: _Channels) -> jax.Array:
        """The row, normalised in float32."""
        wide = row.astype(jnp.float32)
        weight = channels.load(weight_ref).astype(jnp.float32)
        weight = weight + self.offset if self.offset else weight
        return wide * lax.rsqrt(jnp.sum(wide * wide, axis=0) / channels.width + self.eps) * weight


def _kernel(*refs: Any, channels: _Channels, summands: int, norms: list[_Scaling]) -> None:
    """The kernel's program for one row."""
    inputs, weights, (*sum_refs, out_ref) = refs[:summands], refs[summands:-summands], refs[-summands:]
    row = channels.load(inputs[0])
    for added_ref, sum_ref in zip(inputs[1:], sum_refs, strict=True):
        added = channels.load(added_ref)
        if len(norms) > 1:
            added = norms[1].of(added, weights[1], channels).astype(added.dtype)
        row = (row.astype(jnp.float32) + added.astype(jnp.float32)).astype(sum_ref.dtype)
        channels.store(sum_ref, row)
    channels.store(out_ref, norms[0].of(row, weights[0], channels))
