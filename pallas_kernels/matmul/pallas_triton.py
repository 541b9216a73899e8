"""Products of few rows with large weights as a Pallas kernel on Triton.

The weights are the left operand and the rows the right one, because tensor cores take at least 64 rows of the left
operand but only 8 columns of the right one; Triton pads a single row to 16. A program computes a tile of outputs: it
reads its weights once, several blocks ahead, and accumulates in float32. Where the tiles are too few programs to keep
the memory busy, several programs divide a tile's inputs among them (split-K). XLA adds their partial sums in the kernel
that it makes of the operations after the product.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.matmul.tiles import Config
from pallas_kernels.norm import Norm

Ref = Any


def product(
    x: jax.Array,
    w: jax.Array,
    residual: jax.Array | None,
    norm: Norm | None,
    config: Config,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`linear` for weights w [1, n, k], `gated_linear` for [2, n, k]: [m, n] in x's dtype.

    To normalise, rows are multiplied by the norm's weights and rounded to x's dtype before the product, and divided by
    their root mean square after it; the loop of the product also sums the squares.
    """
    (m, k), (planes, n, _) = x.shape, w.shape
    gamma, eps, offset = (None, 0.0, 0.0) if norm is None else (norm.weight, norm.eps, norm.offset)
    whole_sums = config.splits == 1
    added = residual if whole_sums else None
    if whole_sums:
        out_shape = [jax.ShapeDtypeStruct((m, n), x.dtype)]
    else:
        out_shape = [jax.ShapeDtypeStruct((config.splits * planes * m, n), jnp.float32)]
        if norm is not None:
            out_shape.append(jax.ShapeDtypeStruct((config.splits * m,), jnp.float32))
    results = pl.pallas_call(
        partial(_kernel, planes=planes, eps=eps, offset=offset, config=config),
        # Programs that read the same weights are neighbours, so that all but the first find them in the L2 cache.
        grid=(pl.cdiv(m, config.block_m), pl.cdiv(n, config.block_n), config.splits),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="skinny_matmul",
    )(x, w.reshape(planes * n, k), gamma, added)
    if whole_sums:
        return results[0]
    sums = results[0].reshape(config.splits, planes, m, n).sum(0)
    factor = None if norm is None else _factor(results[1].reshape(config.splits, m, 1).sum(0), k, eps)
    return _finish(list(sums), factor, residual).astype(x.dtype)


def _factor(squares: jax.Array, k: int, eps: float) -> jax.Array:
    """The factor that normalises a row, from its sum of squares."""
    return lax.rsqrt(squares / k + eps)


def _finish(sums: Sequence[jax.Array], factor: jax.Array | None, residual: jax.Array | None) -> jax.Array:
    """The float32 result [m, n] from each plane's sums [m, n], the factors of rows [m, 1] and the residual [m, n]."""
    if factor is not None:
        sums = [plane * factor for plane in sums]
    result = sums[0] if len(sums) == 1 else sums[0] * lax.logistic(sums[0]) * sums[1]
    return result if residual is None else result + residual.astype(jnp.float32)


class _Tile(NamedTuple):
    """The tile that a program computes: its first row and output, and its range of input blocks.

    `m` and `n` are the numbers of all rows and outputs; `offset` is added to the weights of the normalisation.
    """

    planes: int
    m: int
    n: int
    offset: float
    row: jax.Array
    output: jax.Array
    first_block: jax.Array | int
    end_block: jax.Array | int


def _kernel(
    x_ref: Ref,
    w_ref: Ref,
    gamma_ref: Ref | None,
    residual_ref: Ref | None,
    out_ref: Ref,
    squares_ref: Ref | None = None,
    *,
    planes: int,
    eps: float,
    offset: float,
    config: Config,
) -> None:
    """The kernel's program for one tile of the result, or for one split of it."""
    (m, k), n = x_ref.shape, w_ref.shape[0] // planes
    split, blocks = pl.program_id(2), k // config.block_k
    first: jax.Array | int = 0
    end: jax.Array | int = blocks
    if config.splits > 1:
        first, end = lax.div(split * blocks, config.splits), lax.div((split + 1) * blocks, config.splits)
    tile = _Tile(planes, m, n, offset, pl.program_id(0) * config.block_m, pl.program_id(1) * config.block_n, first, end)
    sums, squares = (_dots if config.tensor_cores else _row_by_row)(x_ref, w_ref, gamma_ref, tile, config)
    rows, outputs = pl.ds(tile.row, config.block_m), pl.ds(tile.output, config.block_n)
    row_inside = tile.row + jnp.arange(config.block_m) < m
    inside = row_inside[:, None] & (tile.output + jnp.arange(config.block_n) < n)[None, :]
    if config.splits > 1:
        for plane, values in enumerate(sums):
            part = pl.ds((split * planes + plane) * m + tile.row, config.block_m)
            plgpu.store(out_ref.at[part, outputs], values.T, mask=inside)
        if squares_ref is not None:
            part = pl.ds(split * m + tile.row, config.block_m)
            plgpu.store(squares_ref.at[part], squares, mask=row_inside & (tile.output == 0))
        return
    factor = None if gamma_ref is None else _factor(squares, k, eps)[:, None]
    residual = None
    if residual_ref is not None:
        residual = plgpu.load(residual_ref.at[rows, outputs], mask=inside, other=0)
    result = _finish([plane.T for plane in sums], factor, residual)
    plgpu.store(out_ref.at[rows, outputs], result.astype(out_ref.dtype), mask=inside)


def _load_gamma(gamma_ref: Ref, inputs: Any, tile: _Tile) -> jax.Array:
    """The norm's float32 weights for a block of inputs."""
    gamma = plgpu.load(gamma_ref.at[inputs]).astype(jnp.float32)
    return gamma + tile.offset if tile.offset else gamma


def _load_weights(w_ref: Ref, plane: int, tile: _Tile, inputs: Any, config: Config) -> jax.Array:
    """A block [block_n, block_k] of one plane's weights."""
    block = w_ref.at[pl.ds(plane * tile.n + tile.output, config.block_n), inputs]
    if tile.n % config.block_n == 0:
        return plgpu.load(block)
    inside = (tile.output + jnp.arange(config.block_n) < tile.n)[:, None]
    return plgpu.load(block, mask=jnp.broadcast_to(inside, (config.block_n, config.block_k)), other=0)


def _dots(
    x_ref: Ref, w_ref: Ref, gamma_ref: Ref | None, tile: _Tile, config: Config
) -> tuple[list[jax.Array], jax.Array]:
    """Each plane's sums [block_n, block_m] and the sums of squares of the rows [block_m], with tensor cores."""
    planes = range(tile.planes)
    inside = (tile.row + jnp.arange(config.block_m) < tile.m)[:, None]
    inside = jnp.broadcast_to(inside, (config.block_m, config.block_k))

    def add_block(block: jax.Array, carry: tuple[list[jax.Array], jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        sums, squares = carry
        inputs = pl.ds(block * config.block_k, config.block_k)
        full = tile.m % config.block_m == 0
        x_block = x_ref.at[pl.ds(tile.row, config.block_m), inputs]
        x = plgpu.load(x_block) if full else plgpu.load(x_block, mask=inside, other=0)
        if gamma_ref is not None:
            wide = x.astype(jnp.float32)
            squares += jnp.sum(wide * wide, axis=1)
            gamma = _load_gamma(gamma_ref, inputs, tile)
            x = (wide * gamma[None, :]).astype(x.dtype)
        blocks = [_load_weights(w_ref, plane, tile, inputs, config) for plane in planes]
        return [total + plgpu.dot(w, x, trans_b=True) for total, w in zip(sums, blocks, strict=True)], squares

    empty = [jnp.zeros((config.block_n, config.block_m), jnp.float32) for _ in planes]
    return lax.fori_loop(
        tile.first_block, tile.end_block, add_block, (empty, jnp.zeros((config.block_m,), jnp.float32))
    )


def _row_by_row(
    x_ref: Ref, w_ref: Ref, gamma_ref: Ref | None, tile: _Tile, config: Config
) -> tuple[list[jax.Array], jax.Array]:
    """The same as `_dots` without tensor cores: the weights go from memory to registers, not through shared memory."""
    planes, members = range(tile.planes), range(config.block_m)

    def add_block(
        block: jax.Array, carry: tuple[list[list[jax.Array]], list[jax.Array]]
    ) -> tuple[list[list[jax.Array]], list[jax.Array]]:
        sums, squares = carry
        inputs = pl.ds(block * config.block_k, config.block_k)
        weights = [_load_weights(w_ref, plane, tile, inputs, config).astype(jnp.float32) for plane in planes]
        rows = [plgpu.load(x_ref.at[jnp.minimum(tile.row + i, tile.m - 1), inputs]) for i in members]
        if gamma_ref is not None:
            wide = [row.astype(jnp.float32) for row in rows]
            squares = [total + row * row for total, row in zip(squares, wide, strict=True)]
            gamma = _load_gamma(gamma_ref, inputs, tile)
            rows = [(row * gamma).astype(x_ref.dtype) for row in wide]
        factors = [row.astype(jnp.float32)[None, :] for row in rows]
        sums = [
            [total + w * row for total, row in zip(of_plane, factors, strict=True)]
            for of_plane, w in zip(sums, weights, strict=True)
        ]
        return sums, squares

    empty = [[jnp.zeros((config.block_n, config.block_k), jnp.float32) for _ in members] for _ in planes]
    no_squares = [jnp.zeros((config.block_k,), jnp.float32) for _ in members]
    sums, squares = lax.fori_loop(tile.first_block, tile.end_block, add_block, (empty, no_squares))
    place = jnp.arange(config.block_m)

    def side_by_side(columns: list[jax.Array]) -> jax.Array:
        """The sums over k of the columns, each [..., block_k], side by side as [..., block_m]."""
        return sum(
            (jnp.where(place == i, jnp.sum(column, axis=-1)[..., None], 0.0) for i, column in enumerate(columns)),
            start=jnp.zeros((), jnp.float32),
        )

    return [side_by_side(of_plane) for of_plane in sums], side_by_side(squares)
