"""A new architecture is one file: it is found, loaded and listed without a change anywhere else."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.numpy import load_file, save_file

from trtllm_jax import convert_checkpoint, load_model, models
from trtllm_jax.commands.bench.model import ModelFacts

NAME, GGUF_NAME = "PocketForCausalLM", "pocket"
IDS = [5, 80, 3, 200, 41, 7]

# It is Llama in all but name, in the place of its last norm, and in how llama.cpp stores it.
MODULES = ("model.norm", "model.final_layernorm")
RECORD = f'''
GGUF = (
    GgufArchitecture(
        name="{GGUF_NAME}",
        model_type="pocket",
        model_class="{NAME}",
        tensors={{"output_norm": "model.final_layernorm", "blk.{{i}}.post_attention_norm": "{{layer}}"}},
        metadata={{"attention.sliding_window": "sliding_window"}},
    ),
)
'''.replace("{layer}", "model.layers.{i}.post_attention_layernorm")

GGUF_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "post_attention_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(autouse=True)
def pocket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The architecture's file, in a folder that `trtllm_jax.models` searches like its own."""
    source = (Path(models.__path__[0]) / "llama.py").read_text()
    record = source[source.index("\nGGUF = (") : source.index("\n)\n") + 3]
    source = source.replace(record, RECORD).replace("LlamaForCausalLM", NAME).replace(*MODULES)
    folder = tmp_path / "more_models"
    folder.mkdir()
    (folder / "pocket.py").write_text(source.replace(source.splitlines()[0], '"""Pocket, a model of this test."""'))
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    yield
    sys.modules.pop(f"{models.__name__}.pocket", None)
    vars(models).pop("pocket", None)


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama's checkpoint under the new architecture's names."""
    folder = tmp_path / "hf"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [NAME], "model_type": "pocket"}))
    tensors = {name.replace(*MODULES): values for name, values in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def gguf(folder: Path, tmp_path: Path) -> Path:
    """The same checkpoint as a GGUF file."""
    config = json.loads((folder / "config.json").read_text())
    path = tmp_path / "pocket.gguf"
    writer = GGUFWriter(path, GGUF_NAME)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(32)
    for name, values in load_file(folder / "model.safetensors").items():
        writer.add_tensor(gguf_name(name), quants.quantize(values, GGMLQuantizationType.F32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{GGUF_MODULES[module]}.{kind}"
    layer, _, module = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{GGUF_MODULES[module]}.{kind}"


def assert_computes(model: Path, tiny_torch: Any) -> None:
    """The file's weights give the logits of transformers' Llama with the same weights."""
    pocket, params = load_model(model, dtype="float32")
    logits = jax.jit(pocket)(params, np.array([IDS]))
    with torch.no_grad():
        expected = tiny_torch(torch.tensor([IDS])).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_its_safetensors_are_loaded(folder: Path, tiny_torch: Any) -> None:
    assert_computes(folder, tiny_torch)


def test_its_gguf_file_is_loaded(gguf: Path, tiny_torch: Any) -> None:
    assert_computes(gguf, tiny_torch)


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_its_gguf_file_is_converted(gguf: Path, tiny_torch: Any, format: str, tmp_path: Path) -> None:
    converted = convert_checkpoint(gguf, tmp_path / "converted", format=format)
    stated = json.loads((converted / "config.json").read_text())
    assert (stated["model_type"], stated["architectures"], stated["sliding_window"]) == ("pocket", [NAME], 32)
    assert_computes(converted, tiny_torch)


def test_a_benchmark_knows_its_sizes(gguf: Path) -> None:
    assert (ModelFacts(str(gguf)).vocab, ModelFacts(str(gguf)).max_position) == (258, 256)


def test_it_is_listed() -> None:
    assert models.supported()[NAME] == "Pocket, a model of this test."
    assert {known.name for known in models.gguf_architectures()} >= {"llama", GGUF_NAME}
    with pytest.raises(ValueError, match=rf"architectures names 'Perceptron'.*supported: .*LlamaForCausalLM.*, {NAME}"):
        models.architecture({"architectures": ["Perceptron"]})
