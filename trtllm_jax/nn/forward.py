"""The forward pass of any architecture, derived from its `embed`, `layer` and `head`."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache as memoize
from types import ModuleType
from typing import Any

import jax
from jaxtyping import Array, Float

from trtllm_jax.nn.batch import Batch, Caches
from trtllm_jax.nn.cache_group import places
from trtllm_jax.nn.dtypes import activation_dtype, weight_dtype
from trtllm_jax.nn.rope import rotation


@memoize
def _traced_once(layer: Callable[..., Any], remat: bool) -> Callable[..., Any]:
    """`layer` jitted, so that equal layers of a program are traced and lowered once; `remat` saves only its inputs."""
    if remat:
        layer = jax.checkpoint(layer, static_argnums=(0, 1))
    return jax.jit(layer, static_argnums=(0, 1))


def hidden_states(
    model: ModuleType, config: Any, params: Any, batch: Batch, caches: Caches = (), *, remat: bool = False
) -> tuple[Float[Array, "t embed"], Caches]:
    """The residual stream after the last layer, and the caches with the keys and values of this batch.

    With `remat` the backward pass computes each layer again instead of keeping its intermediate values.
    Layers are unrolled: a scan over stacked weights copies each layer's weights, and decoding was 2.8 times slower.
    """
    rotations = tuple(rotation(rope, batch.positions, batch.rope_lengths) for rope in model.ropes(config))
    dtype = activation_dtype(weight_dtype(model.table(config), params), batch.execution.platform)
    batch = replace(batch, rotations=rotations, dtype=dtype)
    x = model.embed(config, params, batch)
    layer = _traced_once(model.layer, remat)
    groups = model.cache_spec(config)
    place_of, owner_of = places(groups), getattr(model, "cache_of", _own)
    in_group = [replace(batch, groups=(), locations=locations) for locations in batch.groups]
    batch_of = {index: one for group, one in zip(groups, in_group, strict=bool(in_group)) for index in group.layers}
    written = list(caches)
    for index, layer_params in enumerate(params["layers"]):
        owner = owner_of(config, index)
        place = place_of.get(owner) if written else None  # a layer without attention has none
        cache = None if place is None else written[place]
        with jax.named_scope(f"layer_{index}"):
            x, cache = layer(
                config, model.same_layer(config, index), layer_params, x, batch_of.get(owner, batch), cache
            )
        if place is not None:
            # A layer that shares a cache writes what is there already; taking its array lets XLA update it in place.
            written[place] = cache
    return x.total, tuple(written)


def _own(config: Any, index: int) -> int:
    """`cache_of` of an architecture in which every layer has a cache of its own."""
    return index
