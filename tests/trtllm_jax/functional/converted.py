"""What the tests of conversions compare, a GGUF file to convert, and the sizes of an engine that reads the result."""

from __future__ import annotations

import itertools
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

SMALL = {"max_batch_size": 1, "max_num_tokens": 16, "max_seq_len": 64, "kv_cache_config": {"max_tokens": 256}}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def write_gguf(path: Path) -> None:
    """A Llama of 2 layers whose weights are Q4_0, Q8_0 and F32, with byte-level tokens."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (352, 64), "output_norm": (64,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": (64,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.attn_q": (64, 64), f"blk.{i}.attn_k": (32, 64), f"blk.{i}.attn_v": (32, 64)}
        shapes |= {f"blk.{i}.attn_output": (64, 64), f"blk.{i}.ffn_gate": (96, 64), f"blk.{i}.ffn_up": (96, 64)}
        shapes[f"blk.{i}.ffn_down"] = (64, 96)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(352)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"<{i}>" for i in range(64)] + [chr(i + 0x100) for i in range(256)] + ["\u0100\u0101"])
    writer.add_token_types([3] * 64 + [1] * 257)
    writer.add_token_merges([f"{chr(0x100)} {chr(0x101)}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    kinds = itertools.cycle((gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0))
    for name, shape in shapes.items():
        kind = next(kinds) if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        values = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
