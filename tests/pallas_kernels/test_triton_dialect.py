"""Lowering a kernel for Triton does not search the file system for a dialect that it never finds."""

import sys
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.norm import Norm, pallas_triton


class Watch:
    """A finder that finds nothing and counts what is looked for."""

    def __init__(self) -> None:
        self.searches: Counter[str] = Counter()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        self.searches[name] += 1


@pytest.fixture
def watch() -> Iterator[Watch]:
    watch = Watch()
    sys.meta_path.insert(0, watch)
    yield watch
    sys.meta_path.remove(watch)


def test_the_dialect_is_not_searched_for(watch: Watch) -> None:
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    mesh = AbstractMesh((1,), ("x",), abstract_device=device, axis_types=(AxisType.Auto,))
    x, weight = jax.ShapeDtypeStruct((32, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256,), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        norm = jax.jit(lambda x, weight: pallas_triton.normalise(x, Norm(weight, 1e-5)))
        text = norm.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text
    assert not [name for name in watch.searches if name.endswith(".tt")]
