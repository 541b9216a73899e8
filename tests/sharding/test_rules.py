from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from sharding import make_mesh, pad_sizes, spec_of
from sharding.rules import MESH_AXIS_OF


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("vocab", "embed"), P("tp", None)),
        (("embed", "kv_heads", "group", "head_dim"), P(None, "tp", None, None)),
        (("two", "mlp", "embed"), P(None, "tp", None)),
        (("embed",), P(None)),
        ((), P()),
    ],
)
def test_split_axes_name_their_mesh_axis_and_others_are_replicated(axes: tuple[str, ...], spec: P) -> None:
    assert spec_of(axes) == spec


@pytest.mark.multi_device(4)
def test_padding_of_smollm2_on_four_devices() -> None:
    sizes = {"vocab": 49152, "embed": 576, "mlp": 1536, "kv_heads": 3, "group": 3, "head_dim": 64, "layers": 30}
    assert pad_sizes(sizes, make_mesh(4)) == {"vocab": 49152, "mlp": 1536, "kv_heads": 4}


@pytest.mark.multi_device(8)
@given(
    sizes=st.dictionaries(st.sampled_from([*MESH_AXIS_OF, "embed", "layers"]), st.integers(1, 10**6)),
    devices=st.integers(1, 8),
)
def test_padding_is_the_least_that_the_mesh_divides(sizes: dict[str, int], devices: int) -> None:
    padded = pad_sizes(sizes, make_mesh(devices))
    assert padded.keys() == sizes.keys() & MESH_AXIS_OF.keys()
    for axis, size in padded.items():
        assert size % devices == 0
        assert 0 <= size - sizes[axis] < devices
