from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.gguf_file import GgufFile
from checkpoints.gguf_source import GgufSource

from .gguf_llama import LLAMA

WriteGguf = Callable[..., Path]
EMBED = "model.embed_tokens.weight"
RNG = np.random.default_rng(0)


def source_of(path: Path, architecture: GgufArchitecture = LLAMA) -> GgufSource:
    return GgufSource(GgufFile(path), architecture)


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to the rows of q and k: the two halves of a head interleave."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def stored_as(kind: str, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored bytes of that type, and their values by the gguf package."""
    quant = GGMLQuantizationType[kind]
    try:
        stored = quants.quantize(RNG.standard_normal((rows, columns)).astype(np.float32), quant)
    except NotImplementedError:  # the package only reads the K types: any bytes with finite scales will do
        block_size, block_bytes = GGML_QUANT_SIZES[quant]
        blocks = RNG.integers(0, 256, (rows, columns // block_size, block_bytes), np.uint8)
        scales = {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}[kind]
        for at in scales:
            blocks[..., at : at + 2] = RNG.standard_normal((*blocks.shape[:2], 1)).astype(np.float16).view(np.uint8)
        stored = blocks.reshape(rows, -1)
    return stored.view(np.uint8), quants.dequantize(stored, quant)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_every_quantised_type_reads_as_the_gguf_package_dequantises_it(kind: str, write_gguf: WriteGguf) -> None:
    stored, values = stored_as(kind, 33, 768)
    path = write_gguf({"token_embd.weight": stored}, types={"token_embd.weight": GGMLQuantizationType[kind]})
    source = source_of(path)
    assert (source.info[EMBED].shape, source.info[EMBED].dtype) == ((33, 768), "float32")
    assert np.isfinite(values).all()
    for index in (
        np.s_[:, :],
        np.s_[5:9, :],
        np.s_[32:, 256:512],
        np.s_[3:20, 31:33],
        np.s_[:, 700:701],
        np.s_[4:4, :],
    ):
        np.testing.assert_array_equal(source.read(EMBED, index), values[index])


@pytest.mark.parametrize(("kind", "dtype"), [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_float_types_keep_their_dtype_and_bits(kind: str, dtype: Any, write_gguf: WriteGguf) -> None:
    values = RNG.standard_normal((6, 10)).astype(dtype)
    stored = values.view(np.uint8) if kind == "BF16" else values.astype(np.float32)
    quant = GGMLQuantizationType[kind]
    source = source_of(write_gguf({"token_embd.weight": stored}, types={"token_embd.weight": quant}))
    assert source.info[EMBED].dtype == np.dtype(dtype).name
    part = source.read(EMBED, np.s_[1:4, 2:9])
    assert part.dtype == dtype
    np.testing.assert_array_equal(part, values[1:4, 2:9])


def test_tensors_have_their_hugging_face_names(write_gguf: WriteGguf) -> None:
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "blk.1.attn_norm.weight": "model.layers.1.input_layernorm.weight",
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "blk.1.attn_k.bias": "model.layers.1.self_attn.k_proj.bias",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
        "blk.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
        "blk.1.ffn_gate.weight": "model.layers.1.mlp.gate_proj.weight",
        "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "blk.1.something_new.weight": "blk.1.something_new.weight",
    }
    tensors = {name: np.zeros((32, 32), np.float32) for name in names} | {"rope_freqs.weight": np.ones(4, np.float32)}
    assert list(source_of(write_gguf(tensors)).info) == list(names.values())


def test_an_architecture_names_further_tensors_and_some_otherwise(write_gguf: WriteGguf) -> None:
    layer = "model.layers.{i}"
    other = dataclasses.replace(
        LLAMA,
        permuted={},
        tensors={
            "output_norm": "model.final_layernorm",
            "blk.{i}.attn_q_norm": f"{layer}.self_attn.q_norm",
            "blk.{i}.ffn_norm": f"{layer}.pre_feedforward_layernorm",
        },
    )
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.final_layernorm.weight",
        "blk.1.attn_q_norm.weight": "model.layers.1.self_attn.q_norm.weight",
        "blk.1.ffn_norm.weight": "model.layers.1.pre_feedforward_layernorm.weight",
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
    }
    values = {name: RNG.standard_normal((32, 32)).astype(np.float32) for name in names}
    source = source_of(write_gguf(values), other)
    assert list(source.info) == list(names.values())
    for name, stored in values.items():
        np.testing.assert_array_equal(source.read(names[name], np.s_[:, :]), stored)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_rows_of_q_and_k_come_back_in_their_own_order(kind: str, write_gguf: WriteGguf) -> None:
    q, k, v = (RNG.standard_normal((rows, 32)).astype(np.float32) for rows in (32, 16, 16))
    tensors = {
        "token_embd.weight": np.zeros((4, 32), np.float32),
        "blk.0.attn_q.weight": permuted(q, 4),
        "blk.0.attn_k.weight": permuted(k, 2),
        "blk.0.attn_v.weight": v,
    }
    quant = GGMLQuantizationType[kind]
    source = source_of(write_gguf(tensors, types=dict.fromkeys(tensors, quant)))
    for part, original in {"q": q, "k": k, "v": v}.items():
        # Rows are quantised one by one, so their order makes no difference to their values.
        expected = quants.dequantize(quants.quantize(original, quant), quant)
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        for index in (np.s_[:, :], np.s_[8:16, :], np.s_[3:13, 5:20]):
            np.testing.assert_array_equal(source.read(name, index), expected[index])


def test_biases_of_q_and_k_come_back_in_their_own_order(write_gguf: WriteGguf) -> None:
    q, k = (RNG.standard_normal(rows).astype(np.float32) for rows in (32, 16))
    tensors = {
        "token_embd.weight": np.zeros((4, 32), np.float32),
        "blk.0.attn_q.bias": permuted(q, 4),
        "blk.0.attn_k.bias": permuted(k, 2),
    }
    source = source_of(write_gguf(tensors))
    np.testing.assert_array_equal(source.read("model.layers.0.self_attn.q_proj.bias", (slice(5, 21),)), q[5:21])
    np.testing.assert_array_equal(source.read("model.layers.0.self_attn.k_proj.bias", (slice(None),)), k)


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_norms_that_are_stored_plus_one_are_read_without(kind: str, write_gguf: WriteGguf) -> None:
    tensors = {
        "token_embd.weight": np.zeros((4, 32), np.float32),
        "output_norm.weight": np.array([1.25, 0.5, 0.0, 1.0], np.float32),
        "blk.0.ffn_norm.weight": np.full(4, 3, np.float32),
        "blk.0.attn_q.bias": np.full(32, 3, np.float32),
    }
    path = write_gguf(tensors, types=dict.fromkeys(tensors, GGMLQuantizationType[kind]))
    source = source_of(path, dataclasses.replace(LLAMA, permuted={}, norms_plus_one=True))
    assert source.info["model.norm.weight"].dtype == "float32"
    read = source.read("model.norm.weight", np.s_[1:,])
    assert (read.dtype, read.tolist()) == (np.float32, [-0.5, -1.0, 0.0])
    assert source.read("model.layers.0.post_attention_layernorm.weight", np.s_[:,]).tolist() == [2.0] * 4
    assert source.read("model.layers.0.self_attn.q_proj.bias", np.s_[:,]).tolist() == [3.0] * 32


def test_only_the_wanted_rows_and_blocks_are_dequantised(
    write_gguf: WriteGguf, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, _ = stored_as("Q8_0", 64, 128)
    tensors = {"token_embd.weight": np.zeros((4, 32), np.float32), "blk.0.attn_q.weight": stored}
    source = source_of(write_gguf(tensors, types={"blk.0.attn_q.weight": GGMLQuantizationType.Q8_0}))
    done: list[int] = []
    dequantize = quants.dequantize
    monkeypatch.setattr(quants, "dequantize", lambda data, kind: done.append(data.size) or dequantize(data, kind))
    source.read("model.layers.0.self_attn.q_proj.weight", np.s_[10:13, 40:70])
    assert sum(done) == 3 * 2 * 34  # three rows of two blocks of 34 bytes


def test_an_unsupported_type_names_the_tensor_and_what_is_supported(write_gguf: WriteGguf) -> None:
    path = write_gguf(
        {"token_embd.weight": np.zeros((2, 84), np.uint8)}, types={"token_embd.weight": GGMLQuantizationType.Q2_K}
    )
    with pytest.raises(ValueError, match=r"'token_embd\.weight' is stored as Q2_K; supported: F32, F16, Q4_0, .*BF16"):
        source_of(path)


def test_a_quantised_vector_is_refused(write_gguf: WriteGguf) -> None:
    tensors = {"token_embd.weight": np.zeros((4, 32), np.float32), "blk.0.attn_q.bias": np.zeros(34, np.uint8)}
    path = write_gguf(tensors, types={"blk.0.attn_q.bias": GGMLQuantizationType.Q8_0})
    with pytest.raises(ValueError, match=r"'blk\.0\.attn_q\.bias' is stored as Q8_0; it must be a float"):
        source_of(path)
