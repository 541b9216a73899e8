"""What a conversion keeps of a Hugging Face folder: weights, configuration and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from trtllm_jax import convert_checkpoint, load_model
from trtllm_jax.functional.research import open_model

from ..tiny_encoders import SIZES, save, state_pooling
from .converted import assert_same, tensors_of


@pytest.fixture
def bfloat16_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama in bfloat16, in several files, with biases and what people leave in a folder."""
    folder = tmp_path / "source"
    config = LlamaConfig.from_pretrained(tiny_llama, attention_bias=True, mlp_bias=True)
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("free")
    (folder / "training_args.bin").write_text("not for us")
    return folder


def test_to_orbax_and_back_is_bit_exact(bfloat16_llama: Path, tmp_path: Path) -> None:
    there = convert_checkpoint(bfloat16_llama, tmp_path / "orbax", format="orbax")
    back = convert_checkpoint(there, tmp_path / "back", max_shard_size="100KB")
    assert_same(tensors_of(back), tensors_of(bfloat16_llama))
    assert all(path.stat().st_size < 110_000 for path in back.glob("*.safetensors"))
    files = {path.name for path in bfloat16_llama.iterdir() if path.suffix != ".safetensors"} - {"training_args.bin"}
    assert {path.name for path in back.iterdir() if path.suffix != ".safetensors"} == files
    for name in files - {"model.safetensors.index.json"}:
        assert (there / name).read_bytes() == (back / name).read_bytes() == (bfloat16_llama / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(back)


def test_an_encoder_keeps_how_it_pools(tmp_path: Path) -> None:
    folder, orbax, back = (tmp_path / name for name in ("bert", "orbax", "back"))
    save(BertForSequenceClassification, BertConfig(**SIZES, num_labels=3), folder)
    state_pooling(folder, "cls_token", normalize=False)
    convert_checkpoint(folder, orbax, format="orbax")
    convert_checkpoint(orbax, back, tokenizer=folder)
    assert_same(tensors_of(back), tensors_of(folder))
    for one in (orbax, back):
        for name in ("modules.json", "config.json"):
            assert (one / name).read_bytes() == (folder / name).read_bytes()
        assert open_model(one).pooling == ("cls", False)


def test_what_nothing_reads_is_left_out_of_orbax(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    there = convert_checkpoint(source, tmp_path / "orbax", format="orbax")
    back = convert_checkpoint(there, tmp_path / "back")
    del tensors["lm_head.weight"], tensors["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert_same(tensors_of(back), tensors)
    # Between Hugging Face folders everything stays.
    assert_same(tensors_of(convert_checkpoint(source, tmp_path / "copy")), tensors_of(source))


def test_a_head_that_the_configuration_denies_goes_along(tiny_llama: Path, tmp_path: Path) -> None:
    """Its model's logits are those of transformers, in every format and after every conversion."""
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    there = convert_checkpoint(source, tmp_path / "orbax", format="orbax")
    (there / "config.json").write_text((source / "config.json").read_text())
    tokens = np.arange(5, 25)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(torch.tensor(tokens[None])).logits[0]
    for folder in (
        source,
        there,
        convert_checkpoint(source, tmp_path / "copy"),
        convert_checkpoint(there, tmp_path / "back"),
    ):
        np.testing.assert_allclose(_logits(folder, tokens), expected, rtol=1e-4, atol=1e-4)
    for folder in (tmp_path / "copy", tmp_path / "back"):
        assert json.loads((folder / "config.json").read_text()) == config | {"tie_word_embeddings": False}


def _logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    model, params = load_model(folder, dtype="float32")
    return np.asarray(model(params, tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_rounds_every_weight_once_and_is_stated(dtype: str, tiny_llama: Path, tmp_path: Path) -> None:
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors_of(tiny_llama).items()}
    direct = convert_checkpoint(tiny_llama, tmp_path / "direct", dtype=dtype)
    there = convert_checkpoint(tiny_llama, tmp_path / "orbax", format="orbax", dtype=dtype)
    for folder in (direct, convert_checkpoint(there, tmp_path / "back")):
        assert_same(tensors_of(folder), expected)
        assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == getattr(torch, dtype)
        before, after = (json.loads((path / "config.json").read_text()) for path in (tiny_llama, folder))
        assert after == before | {"dtype": dtype}


def test_both_spellings_of_the_dtype_are_kept(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    folder = convert_checkpoint(source, tmp_path / "out", dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text()) == config | {"torch_dtype": "bfloat16"}


def test_another_tokenizer_replaces_every_file_of_the_first(
    bfloat16_llama: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    (bfloat16_llama / "special_tokens_map.json").write_text("{}")
    folder = convert_checkpoint(bfloat16_llama, tmp_path / "out", tokenizer=tiny_llama)
    assert not (folder / "special_tokens_map.json").exists()
    assert not (folder / "chat_template.jinja").exists()
    assert AutoTokenizer.from_pretrained(folder).encode("hi") == AutoTokenizer.from_pretrained(tiny_llama).encode("hi")
