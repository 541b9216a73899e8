"""Root-mean-square normalisation, optionally of a sum, as one Pallas kernel on Triton.

XLA compiles it to two or three kernels, each of which takes longer to launch than to run in a decode step.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.norm.record import Norm

ELEMENTS_A_WARP = 1024


def normalise(x: jax.Array, norm: Norm, *, interpret: bool = False) -> jax.Array:
    """`pallas_kernels.norm.normalise`, with one program per row."""
    (normed,) = _call((x,), norm, interpret)
    return normed


def add_and_normalise(
    x: jax.Array, added: jax.Array, norm: Norm, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`pallas_kernels.norm.add_and_normalise`, with one program per row."""
    total, normed = _call((x, added), norm, interpret)
    return total, normed


def _call(summands: tuple[jax.Array, ...], norm: Norm, interpret: bool) -> list[jax.Array]:
    """The normalised sum; if there are several summands, the sum itself comes first."""
    shape, dtype = summands[0].shape, summands[0].dtype
    width = shape[-1]
    padded = pl.next_power_of_2(width)
    rows = [summand.reshape(-1, width) for summand in summands]
    row = pl.BlockSpec((None, width), lambda index: (index, 0))
    results: list[jax.Array] = pl.pallas_call(
        partial(_kernel, summands=len(rows), width=width, padded=padded, eps=norm.eps, offset=norm.offset),
        grid=(rows[0].shape[0],),
        in_specs=[*[row] * len(rows), pl.BlockSpec((width,), lambda index: (0,))],
        out_specs=[row] * len(rows),
        out_shape=[jax.ShapeDtypeStruct(rows[0].shape, dtype)] * len(rows),
        compiler_params=plgpu.CompilerParams(num_warps=min(8, max(1, padded // ELEMENTS_A_WARP)), num_stages=1),
        interpret=interpret,
        name="rms_norm",
    )(*rows, norm.weight)
    return [result.reshape(shape) for result in results]


def _kernel(*refs: Any, summands: int, width: int, padded: int, eps: float, offset: float) -> None:
    """The kernel's program for one row."""
    inputs, (weight_ref, *sum_refs, out_ref) = refs[:summands], refs[summands:]
    place = jnp.arange(padded)
    mask, other = (None, None) if padded == width else (place < width, 0)
    row = plgpu.load(inputs[0].at[place], mask=mask, other=other)
    for more in inputs[1:]:
        row = row.astype(jnp.float32) + plgpu.load(more.at[place], mask=mask, other=other).astype(jnp.float32)
    for sum_ref in sum_refs:
        row = row.astype(sum_ref.dtype)
        plgpu.store(sum_ref.at[place], row, mask=mask)
    wide = row.astype(jnp.float32)
    weight = plgpu.load(weight_ref.at[place], mask=mask, other=other).astype(jnp.float32)
    if offset:
        weight += offset
    scale = lax.rsqrt(jnp.sum(wide * wide, axis=0) / width + eps)
    plgpu.store(out_ref.at[place], (wide * scale * weight).astype(out_ref.dtype), mask=mask)
