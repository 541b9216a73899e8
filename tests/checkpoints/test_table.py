from __future__ import annotations

import numpy as np
import pytest

from checkpoints.table import Stored, Weight, assemble, blocks, expand, shape, to_stored
from sharding import Extents

QKV = Weight(
    "layers.{i}.qkv",
    "kv_heads qkv head_dim embed",
    (
        Stored("model.layers.{i}.self_attn.q_proj.weight", "(kv_heads qkv head_dim) embed", "group"),
        Stored("model.layers.{i}.self_attn.k_proj.weight", "(kv_heads qkv head_dim) embed"),
        Stored("model.layers.{i}.self_attn.v_proj.weight", "(kv_heads head_dim) embed"),
    ),
    fuse="qkv",
)
EXPERTS = Weight(
    "experts",
    "experts gate_up embed mlp",
    (Stored("experts.{experts}.w1.weight", "mlp embed"), Stored("experts.{experts}.w3.weight", "mlp embed")),
    fuse="gate_up",
)
SIZES = {"kv_heads": 3, "group": 2, "head_dim": 4, "embed": 5, "mlp": 6, "experts": 3, "layers": 2}


def test_every_layer_gets_its_rows_and_other_rows_stay() -> None:
    head = Weight("head", "embed", (Stored("lm_head.weight", "embed"),))
    rows = expand([QKV, head], 2)
    assert [row.path for row in rows] == ["layers.0.qkv", "layers.1.qkv", "head"]
    assert rows[1].stored[2].name == "model.layers.1.self_attn.v_proj.weight"
    assert expand(rows, 2) == rows


def test_paths_become_dicts_and_layers_a_tuple_in_numeric_order() -> None:
    leaves = [(f"layers.{i}.a", i) for i in (0, 10, 2, 1, 3, 4, 5, 6, 7, 8, 9)]
    assert assemble([("embed", "e"), *leaves]) == {"embed": "e", "layers": tuple({"a": i} for i in range(11))}


@pytest.mark.parametrize(
    ("padded", "expected"),
    [
        ({}, (3, 4, 4, 5)),
        ({"kv_heads": 4}, (4, 4, 4, 5)),
        ({"kv_heads": 4, "group": 3, "embed": 8, "mlp": 99}, (4, 5, 4, 8)),
    ],
)
def test_the_fused_extent_is_the_sum_of_its_padded_pieces(padded: dict[str, int], expected: tuple[int, ...]) -> None:
    assert shape(QKV, Extents(SIZES, padded)) == expected


def test_stored_shapes_and_names() -> None:
    q, k, v = blocks(expand([QKV], 1)[0], Extents(SIZES))
    assert (q.stored_shape, k.stored_shape, v.stored_shape) == ((24, 5), (12, 5), (12, 5))
    assert [block.name for block in blocks(EXPERTS, Extents(SIZES))] == [
        f"experts.{expert}.{part}.weight" for part in ("w1", "w3") for expert in range(3)
    ]


def test_to_stored_cuts_out_each_piece_without_its_padding() -> None:
    padded = {"kv_heads": 4, "group": 3, "embed": 8}
    array = np.arange(4 * 5 * 4 * 8).reshape(4, 5, 4, 8)
    tensors = dict(to_stored(expand([QKV], 1)[0], array, Extents(SIZES, padded)))
    np.testing.assert_array_equal(
        tensors["model.layers.0.self_attn.q_proj.weight"], array[:3, 0:2, :, :5].reshape(24, 5)
    )
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.k_proj.weight"], array[:3, 3, :, :5].reshape(12, 5))
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.v_proj.weight"], array[:3, 4, :, :5].reshape(12, 5))


def test_to_stored_undoes_transposes_and_expert_stacking() -> None:
    array = np.arange(3 * 2 * 5 * 6).reshape(3, 2, 5, 6)
    tensors = dict(to_stored(EXPERTS, array, Extents(SIZES)))
    np.testing.assert_array_equal(tensors["experts.1.w3.weight"], array[1, 1].T)


def test_to_stored_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"'experts' has the shape \(1, 2\), expected \(3, 2, 5, 6\)"):
        list(to_stored(EXPERTS, np.zeros((1, 2)), Extents(SIZES)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "x y", (Stored("t", "x"),)), "each axis must be there exactly once"),
        (("a", "x", (Stored("t", "(x x)"),)), "each axis must be there exactly once"),
        (("a", "x y", (Stored("t", "x", 2),), "y"), "each axis must be there exactly once"),
        (("a", "x y", (Stored("t.{y}", "x y"),)), "each axis must be there exactly once"),
        (("a", "x", (Stored("t", "x"), Stored("u", "x"))), "name the axis to fuse"),
        (("a", "x", (Stored("t", "x"),), "y"), "fuses along 'y'"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Weight(*arguments)


def test_unknown_sizes_and_impossible_padding_are_named() -> None:
    with pytest.raises(ValueError, match="axis 'kv_heads', whose size is not among"):
        shape(QKV, Extents({"embed": 1}))
    with pytest.raises(ValueError, match="axis 'embed' cannot be padded to 4: its size is 5"):
        Extents(SIZES, {"embed": 4})
