"""Parameters on the devices, each shard read straight from the checkpoint."""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding

from checkpoints.fit import require_fit
from checkpoints.packed_source import PackedSource
from checkpoints.prefixed_source import with_prefix
from checkpoints.shards import read_shard
from checkpoints.source import TensorSource
from checkpoints.table import Params, Sizes, Weight, assemble, blocks, expand, leaf_shape, shape, stored_shapes
from pallas_kernels.weights import quantize_int8
from sharding import Extents, ShardingRules

Progress = Callable[[int, int], None]

# Buffers that some checkpoints carry although they follow from the configuration.
IGNORED = ("*.rotary_emb.inv_freq", "*.attn.masked_bias", "*.attention.masked_bias")

# Dequantising is numpy arithmetic that releases the interpreter lock; each thread holds one shard of one weight.
MAX_THREADS = 8


def load_params(
    table: Iterable[Weight],
    source: TensorSource,
    *,
    extents: Extents,
    rules: ShardingRules,
    dtype: npt.DTypeLike,
    progress: Progress | None = None,
    ignore: Sequence[str] = IGNORED,
) -> Params:
    """The parameters of `table`, in `dtype` and placed by `rules`; padding is zero.

    `extents` are those of every logical axis, and of `layers`. Before anything is read the names and shapes of all rows
    are checked: one ValueError lists every missing tensor, every tensor that no row uses and no `ignore` pattern (as in
    fnmatch) matches, and every wrong shape.
    `progress(done, total)` is called in this thread after each weight, in bytes of the finished parameters. The host
    holds one shard of a few weights at a time, and the arrays never share memory with the file.
    """
    rows = expand(table, extents["layers"])
    source = as_hugging_face(source, rows, extents.sizes)
    check(rows, source, sizes=extents.sizes, ignore=ignore)

    def load(row: Weight) -> Any:
        leaf = leaf_shape(row, extents, rules, dtype)
        return as_leaf(_load(row, source, extents, rules.sharding(row.axis_names), own_dtype(row, dtype)), row, leaf)

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        return collect(rows, threads.map(load, rows), extents, rules, dtype, progress)


def check(rows: Iterable[Weight], source: TensorSource, *, sizes: Sizes, ignore: Sequence[str] = IGNORED) -> None:
    """ValueError unless the source holds exactly the tensors of the expanded rows, in their shapes."""
    places = (block for row in rows for block in blocks(row, Extents(sizes)))
    require_fit(stored_shapes(places), source.info, ignore)


def as_hugging_face(source: TensorSource, rows: Sequence[Weight], sizes: Sizes) -> TensorSource:
    """The source under Hugging Face's names; ValueError where Orbax's arrays, which lack them, do not fit the rows."""
    from checkpoints.orbax_source import OrbaxSource  # tensorstore is for those who need it

    return PackedSource(source, rows, sizes) if isinstance(source, OrbaxSource) else with_prefix(source, rows)


def ignorable(config: Mapping[str, Any], further: Iterable[str] = ()) -> tuple[str, ...]:
    """The tensors that a checkpoint of this config.json may hold although nothing reads them; `further` is its own."""
    # Many files of models with tied embeddings hold the tied copy too.
    tied = ("lm_head.weight",) if config.get("tie_word_embeddings") else ()
    return (*IGNORED, *tied, *further)


def own_dtype(row: Weight, dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The dtype of a row's array in a model of `dtype`, before it is quantised."""
    return np.dtype(row.dtype or dtype)


def as_leaf(array: jax.Array, row: Weight, leaf: Any) -> Any:
    """A row's array as the leaf of the parameters that `leaf_shape` gives: itself, or quantised."""
    if row.format is None:
        return array
    placed = jax.tree.map(lambda part: part.sharding, leaf)
    return jax.jit(quantize_int8, static_argnums=1, out_shardings=placed)(array, row.inputs)


def collect(
    rows: Sequence[Weight],
    leaves: Iterable[Any],
    extents: Extents,
    rules: ShardingRules,
    dtype: npt.DTypeLike,
    progress: Progress | None,
) -> Params:
    """The tree of the rows' leaves in their order; `progress(done, total)` is called after each, with bytes."""
    total = sum(_bytes(leaf_shape(row, extents, rules, dtype)) for row in rows)
    named = []
    done = 0
    for row, leaf in zip(rows, leaves, strict=True):
        named.append((row.path, leaf))
        done += _bytes(leaf)
        if progress is not None:
            progress(done, total)
    return assemble(named)


def _bytes(leaf: Any) -> int:
    return sum(math.prod(part.shape) * part.dtype.itemsize for part in jax.tree.leaves(leaf))


def _load(
    row: Weight, source: TensorSource, extents: Extents, sharding: NamedSharding, dtype: np.dtype[Any]
) -> jax.Array:
    whole = shape(row, extents)
    places = blocks(row, extents)
    devices_of = defaultdict(list)  # a shard that several devices hold is read once
    for device, index in sharding.addressable_devices_indices_map(whole).items():
        window = tuple(part.indices(length)[:2] for part, length in zip(index or (), whole, strict=True))
        devices_of[window].append(device)
    arrays: list[jax.Array] = []
    for window, devices in devices_of.items():
        shard = read_shard(row.axis_names, places, source, window, dtype)
        arrays.extend(jax.device_put(shard, device) for device in devices)
    array = jax.make_array_from_single_device_arrays(whole, sharding, arrays)
    return array.block_until_ready()  # so that the host's copies do not pile up behind the transfers
