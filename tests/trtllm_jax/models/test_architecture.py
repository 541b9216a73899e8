from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import LlamaConfig

from trtllm_jax.functional.conversion import convert_checkpoint
from trtllm_jax.functional.research import load_model
from trtllm_jax.llmapi.llm_args import parse_llm_args
from trtllm_jax.llmapi.loading import load
from trtllm_jax.models import architecture, bert, gemma3, llama, unread_tensors


def test_found_by_the_name_in_the_configuration() -> None:
    assert architecture({"architectures": ["LlamaForCausalLM"]}) is llama


@pytest.mark.parametrize("config", [{"architectures": ["Perceptron"]}, {"architectures": []}, {}])
def test_unknown_one_is_an_error_that_lists_those_supported(config: dict[str, Any]) -> None:
    wanted = "'Perceptron'" if config.get("architectures") else "None"
    with pytest.raises(ValueError, match=rf"architectures names {wanted}.*supported: .*LlamaForCausalLM"):
        architecture(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "wide"}, r"config\.json has hidden_size='wide'"),
        ({"vocab_size": None}, r"config\.json lacks vocab_size"),
        ({"hidden_act": "sine"}, r"config\.json has hidden_act='sine'; supported here"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "spiral"),
        ({"rope_theta": 0, "rope_parameters": None}, r"has rope_theta=0; it must be a number of at least"),
        ({"is_causal": False}, r"config\.json has is_causal=False"),
        ({"text_config": {"is_causal": False}}, r"config\.json has is_causal=False"),
        ({"vocab_size": 8}, r"does not fit the architecture.*\n.*missing: model\.embed_tokens"),
        ({"architectures": ["Perceptron"]}, "architectures names 'Perceptron'"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are read from GGUF files only"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said_with_its_folder(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    stated = LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict() | fields
    (folder / "config.json").write_text(json.dumps(stated))
    save_file({"lm_head.weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    for read in (
        lambda: load_model(folder),
        lambda: convert_checkpoint(folder, tmp_path / "converted", format="orbax"),
    ):
        with pytest.raises(ValueError, match=message) as found:
            read()
        assert str(found.value).startswith(f"{folder}: ")
        assert isinstance(found.value.__cause__, ValueError)


def test_what_makes_scores_of_logits_is_said_with_its_folder(tmp_path: Path) -> None:
    stated = LlamaConfig(
        architectures=["LlamaForSequenceClassification"], num_labels=1, vocab_size=32, hidden_size=16,
        intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
    ).to_dict()  # fmt: skip
    stated["sentence_transformers"] = {"activation_fn": "torch.nn.Tanh"}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=f"^{tmp_path}: config.json has 'torch.nn.Tanh' make scores of logits"):
        load(parse_llm_args(model=tmp_path, skip_tokenizer_init=True, load_format="dummy"))


def test_an_architecture_may_name_tensors_that_nothing_reads() -> None:
    assert "cls.*" in unread_tensors(bert, {})
    assert "vision_tower.*" in unread_tensors(gemma3, {"tie_word_embeddings": True})
    assert "lm_head.weight" in unread_tensors(gemma3, {"tie_word_embeddings": True})
    assert "lm_head.weight" not in unread_tensors(llama, {})
