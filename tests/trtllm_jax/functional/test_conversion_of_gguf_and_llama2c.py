"""GGUF and llama2.c files become what transformers reads."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.story import Story
from trtllm_jax import LLM, SamplingParams, convert_checkpoint
from trtllm_jax.logger import logger

from .converted import SMALL, assert_same, tensors_of, write_gguf


def test_gguf_becomes_what_transformers_reads_from_it(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    folder = convert_checkpoint(path, tmp_path / "hf")
    ours, expected = tensors_of(folder), theirs.state_dict()
    assert expected.keys() - ours.keys() == {"lm_head.weight"}  # tied
    assert_same(ours, {name: expected[name] for name in ours})
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, theirs(ids).logits)
    assert AutoTokenizer.from_pretrained(folder).encode("<5><6>") == [5, 6]
    assert loaded.generation_config.eos_token_id == [2]

    there = convert_checkpoint(path, tmp_path / "orbax", format="orbax")
    assert_same(tensors_of(convert_checkpoint(there, tmp_path / "back")), ours)
    assert (there / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def write_llama2c(folder: Path) -> Path:
    """A random model and a tokenizer of single bytes and a few words."""
    header = dim, hidden, layers, heads, kv_heads, vocab, seq_len = (32, 48, 1, 4, 2, 264, 64)
    kv = dim // heads * kv_heads
    count = 2 * dim * dim + 2 * kv * dim + 3 * hidden * dim + 2 * dim
    values = np.random.default_rng(3).standard_normal(vocab * dim + layers * count + dim + seq_len * dim // heads)
    (folder / "model.bin").write_bytes(struct.pack("<7i", *header) + values.astype("<f4").tobytes())
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256)), " ", "a", "b", " a", "ab"]
    entries = [struct.pack("<fi", -float(i), len(piece)) + piece.encode() for i, piece in enumerate(pieces)]
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", 8) + b"".join(entries))
    return folder / "model.bin"


@pytest.mark.slow
def test_llama2c_tells_what_transformers_tells(tmp_path: Path) -> None:
    folder = convert_checkpoint(write_llama2c(tmp_path), tmp_path / "hf")
    prompt = "Once upon a time"
    asked = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    model = LlamaForCausalLM.from_pretrained(folder)
    told = model.generate(**asked, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    with LLM(folder, dtype="float32", **SMALL) as llm:
        output = llm.generate(prompt, SamplingParams(max_tokens=16, ignore_eos=True))
    assert [*output.prompt_token_ids, *output.outputs[0].token_ids] == told


@pytest.mark.slow
def test_a_trained_llama2c_model_tells_its_story(story: Story, tmp_path: Path) -> None:
    """From the file itself, and from the folder that it becomes."""
    prompt = "Once upon a time"
    sizes = SMALL | {"max_seq_len": 96}
    for model in (story.model, convert_checkpoint(story.model, tmp_path / "hf")):
        with LLM(model, dtype="float32", **sizes) as llm:
            output = llm.generate(prompt, SamplingParams(max_tokens=len(story.text) - len(prompt), ignore_eos=True))
        assert prompt + output.outputs[0].text == story.text


def test_without_a_tokenizer_a_warning_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_llama2c(tmp_path)
    (tmp_path / "tokenizer.bin").rename(tmp_path / "other.bin")
    logger.propagate = True
    folder = convert_checkpoint(source, tmp_path / "none")
    assert "The converted model has no tokenizer; name one with the option tokenizer" in caplog.text
    assert not (folder / "tokenizer.json").exists()
    folder = convert_checkpoint(source, tmp_path / "given", tokenizer=tmp_path / "other.bin")
    assert AutoTokenizer.from_pretrained(folder).encode("ab")[0] == 1
