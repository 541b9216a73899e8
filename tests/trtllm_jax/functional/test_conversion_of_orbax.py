"""Orbax folders that a conversion or a user wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from transformers import AutoTokenizer

from trtllm_jax import LLM, convert_checkpoint, load_model
from trtllm_jax.llmapi import loading
from trtllm_jax.llmapi.llm_args import LlmArgs

from .converted import SMALL, assert_same, tensors_of


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
