"""Encoders and sequence classifiers against transformers in float32: hidden states, classes, weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from checkpoints.table import expand, leaf_of, to_stored
from sharding import Extents, make_mesh
from trtllm_jax.functional.loading import load_weights
from trtllm_jax.functional.model import Model
from trtllm_jax.functional.research import open_model
from trtllm_jax.nn.pooling import How, Pooling
from trtllm_jax.nn.rope import Rope

from ..tiny_encoders import SIZES, save

TYPES = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
# The first layer and the fourth see everything, and they differ: the first one has no norm.
MODERN = SIZES | {"local_attention": 8, "num_hidden_layers": 5}
BIASED = MODERN | {
    "attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True, "classifier_pooling": "mean",
    "hidden_activation": "silu", "classifier_activation": "relu", "num_labels": 4,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 3, "num_labels": 5}
MANY_HEADS = SIZES | {"num_labels": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("BertModel", SIZES),
    "BERT, 3 classes": (
        "BertForSequenceClassification",
        SIZES | {"num_labels": 3, "hidden_act": "relu", "layer_norm_eps": 0.1},
    ),
    "RoBERTa": ("RobertaModel", SIZES),
    "RoBERTa, padded with 0": ("RobertaModel", SIZES | {"pad_token_id": 0}),
    "XLM-RoBERTa, 1 class": ("XLMRobertaForSequenceClassification", SIZES | {"num_labels": 1, "type_vocab_size": 1}),
    "ModernBERT": ("ModernBertModel", MODERN),
    "ModernBERT, 4 classes of means": ("ModernBertForSequenceClassification", BIASED),
    "ModernBERT, 2 classes": ("ModernBertForSequenceClassification", MODERN),
    "Llama, 5 classes": ("LlamaForSequenceClassification", GROUPED),
    "Mistral, 5 classes": ("MistralForSequenceClassification", GROUPED | {"sliding_window": 4}),
    "Qwen2, 5 classes": ("Qwen2ForSequenceClassification", GROUPED),
    "Qwen3, 5 classes": ("Qwen3ForSequenceClassification", GROUPED | {"head_dim": 10}),
    "Gemma, 5 classes": ("GemmaForSequenceClassification", GROUPED),
    "Gemma 2, 5 classes": ("Gemma2ForSequenceClassification", GROUPED | TYPES),
    "Gemma 3, 5 classes": ("Gemma3TextForSequenceClassification", GROUPED | TYPES | {"head_dim": 10}),
    "Ministral, 5 classes": ("MinistralForSequenceClassification", GROUPED | TYPES | {"head_dim": 8}),
    "Ministral 3, 5 classes": ("Ministral3ForSequenceClassification", GROUPED | {"head_dim": 8}),
    "Arcee, 5 classes": ("ArceeForSequenceClassification", GROUPED),
    "EXAONE 4, 5 classes": ("Exaone4ForSequenceClassification", GROUPED | TYPES),
    "GLM, 5 classes": ("GlmForSequenceClassification", GROUPED | {"head_dim": 8}),
    "GLM-4, 5 classes": ("Glm4ForSequenceClassification", GROUPED | {"head_dim": 8}),
    "Hunyuan, 5 classes": ("HunYuanDenseV1ForSequenceClassification", GROUPED | {"head_dim": 8}),
    "Nemotron, 5 classes": ("NemotronForSequenceClassification", GROUPED),
    "OLMo, 5 classes": ("OlmoForSequenceClassification", GROUPED),
    "OLMo 2, 5 classes": ("Olmo2ForSequenceClassification", GROUPED),
    "OLMo 3, 5 classes": ("Olmo3ForSequenceClassification", GROUPED | TYPES),
    "Phi, 5 classes": ("PhiForSequenceClassification", GROUPED),
    "Phi-3, 5 classes": ("Phi3ForSequenceClassification", GROUPED),
    "Seed-OSS, 5 classes": ("SeedOssForSequenceClassification", GROUPED | {"head_dim": 8}),
    "SmolLM3, 5 classes": ("SmolLM3ForSequenceClassification", GROUPED),
    "StableLM, 5 classes": ("StableLmForSequenceClassification", GROUPED),
    "StarCoder2, 5 classes": ("Starcoder2ForSequenceClassification", GROUPED),
    "BLOOM, 5 classes": ("BloomForSequenceClassification", MANY_HEADS),
    "Falcon, 5 classes": ("FalconForSequenceClassification", MANY_HEADS),
    "GPT-2, 5 classes": ("GPT2ForSequenceClassification", MANY_HEADS),
    "GPT-BigCode, 5 classes": ("GPTBigCodeForSequenceClassification", MANY_HEADS),
    "GPT-J, 5 classes": ("GPTJForSequenceClassification", MANY_HEADS | {"rotary_dim": 4}),
    "GPT-NeoX, 5 classes": ("GPTNeoXForSequenceClassification", MANY_HEADS),
    "MPT, 5 classes": ("MptForSequenceClassification", MANY_HEADS),
    "OPT, 5 classes": ("OPTForSequenceClassification", MANY_HEADS | {"ffn_dim": 90, "word_embed_proj_dim": 48}),
    "OPT 350M, 5 classes": (
        "OPTForSequenceClassification",
        MANY_HEADS | {"ffn_dim": 90, "word_embed_proj_dim": 26, "do_layer_norm_before": False},
    ),
    "Llama, bare": ("LlamaModel", GROUPED),
    "Mistral, bare": ("MistralModel", GROUPED | {"sliding_window": 4}),
    "Ministral 3, bare": ("Ministral3Model", GROUPED | {"head_dim": 8}),
    "Qwen2, bare": ("Qwen2Model", GROUPED),
    "Qwen3, bare": ("Qwen3Model", GROUPED | {"head_dim": 10}),
    "Command R7B, bare": ("Cohere2Model", GROUPED | TYPES),
    "GPT-2, bare": ("GPT2Model", MANY_HEADS),
    "GPT-J, bare": ("GPTJModel", MANY_HEADS | {"rotary_dim": 4}),
    "OPT 350M, bare": (
        "OPTModel",
        MANY_HEADS | {"ffn_dim": 90, "word_embed_proj_dim": 26, "do_layer_norm_before": False},
    ),
}
LENGTHS = (30, 11, 1)


class Tiny:
    """Transformers' model, ours, and some texts padded to one length."""

    def __init__(self, name: str, folder: Path) -> None:
        architecture, sizes = MODELS[name]
        model_class = getattr(transformers, architecture)
        self.reference = save(model_class, model_class.config_class(**sizes, attn_implementation="eager"), folder)
        self.folder = folder
        self.model: Model = open_model(folder)
        random = np.random.default_rng(0)
        self.lengths = np.array(LENGTHS, np.int32)
        self.tokens = random.integers(4, 101, (len(LENGTHS), 32)).astype(np.int32)  # what is beyond must not matter
        self.types = (np.arange(32) >= self.lengths[:, None] // 2).astype(np.int32)
        # What names of tensors lack in a folder of a decoder by its bare name.
        self.lacking = f"{model_class.base_model_prefix}." if name.endswith("bare") else ""
        self.paired = architecture.startswith("Bert")

    def params(self, devices: int) -> Any:
        return load_weights(self.model, make_mesh(devices), dtype="float32", load_format="auto")

    @torch.no_grad()
    def expected(self, row: int) -> Any:
        """Transformers' output for one text without padding."""
        length = int(self.lengths[row])
        inputs = {"input_ids": torch.tensor(self.tokens[row : row + 1, :length]).long()}
        if self.paired:
            inputs["token_type_ids"] = torch.tensor(self.types[row : row + 1, :length]).long()
        return self.reference(**inputs, attention_mask=torch.ones(1, length).long())


FAST = ("BERT", "XLM-RoBERTa, 1 class", "ModernBERT, 4 classes of means", "Llama, 5 classes", "Mistral, bare")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in FAST else pytest.mark.configurations) for name in MODELS],
)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(request.param, tmp_path_factory.mktemp("encoder"))


def test_vectors_are_those_of_transformers(encoder: Tiny) -> None:
    params = encoder.params(1)
    for how in get_args(How):
        model = replace(encoder.model, pooling=Pooling(how, normalize=False))
        types = encoder.types if encoder.paired else None
        found = np.asarray(model.encode(params, encoder.tokens, encoder.lengths, types))
        for row in range(len(LENGTHS)):
            wanted = encoder.expected(row)
            if model.labels:
                exact = wanted.logits[0].numpy()
            else:
                hidden = wanted.last_hidden_state[0].numpy()
                exact = {"cls": hidden[0], "last": hidden[-1], "mean": hidden.mean(0)}[how]
            assert np.abs(found[row] - exact).max() < 1e-4 * np.abs(exact).max()


def test_weights_are_written_back_bit_for_bit(encoder: Tiny) -> None:
    params, config = encoder.params(1), encoder.model.config
    stored: dict[str, np.ndarray] = {}
    prefix = encoder.lacking
    for weight in expand(encoder.model.module.table(config), config.num_layers):
        array = jax.device_get(leaf_of(params, weight.path))
        tensors = to_stored(weight, array, Extents(config.sizes))
        stored.update((name.removeprefix(prefix), values) for name, values in tensors)
    original = load_file(encoder.folder / "model.safetensors")
    assert {name: original[name].tobytes() for name in stored} == {name: one.tobytes() for name, one in stored.items()}
    assert all("pooler" in name or "head" in name for name in original.keys() - stored.keys())


def test_embeddings_have_length_one(encoder: Tiny) -> None:
    if encoder.model.labels:
        assert not encoder.model.generates
        return
    found = encoder.model.encode(encoder.params(1), encoder.tokens, encoder.lengths)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_next_tokens_are_refused(encoder: Tiny) -> None:
    with pytest.raises(ValueError, match=r"no logits of next tokens: it encodes whole texts, with Model\.encode"):
        encoder.model({}, encoder.tokens)


@pytest.mark.parametrize("types", [[[0, 1]], [[0.0, 1.0, 1.0]]], ids=["too few", "no integers"])
def test_segments_of_another_shape_are_refused(encoder: Tiny, types: Any) -> None:
    with pytest.raises(ValueError, match=r"token_types are .*\[1, [23]\] for tokens \[1, 3\]; want as many integers"):
        encoder.model.encode({}, np.array([[5, 6, 7]]), token_types=np.array(types))


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("BertModel", {"is_decoder": True}, "is_decoder=True"),
        ("BertModel", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("BertModel", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("BertModel", {"hidden_size": 50}, "hidden_size=50 is not a multiple of num_attention_heads=6"),
        ("RobertaModel", {"max_position_embeddings": 2}, "max_position_embeddings=2, .* pad_token_id=1"),
        ("RobertaModel", {"pad_token_id": -1}, "pad_token_id=-1"),
        ("ModernBertModel", {"hidden_size": 50}, "hidden_size=50 is not a multiple of num_attention_heads=6"),
        ("ModernBertModel", {"classifier_pooling": "max"}, "classifier_pooling='max'"),
        ("ModernBertModel", {"hidden_activation": "mish"}, "hidden_activation='mish'"),
        ("ModernBertModel", {"local_attention": 0}, "local_attention=0"),
    ],
)
def test_other_layers_are_refused(architecture: str, fields: dict[str, Any], message: str) -> None:
    from trtllm_jax.models import architecture as module_of

    config = SIZES | {"architectures": [architecture], "layer_norm_eps": 1e-12} | fields
    with pytest.raises(ValueError, match=message):
        module_of(config).Config.from_hf(config)


def test_a_short_configuration_of_modernbert_means_what_transformers_means() -> None:
    from trtllm_jax.models.modernbert import Config

    theirs = transformers.ModernBertConfig()
    stated = {"hidden_size": 768, "intermediate_size": 1152, "num_attention_heads": 12, "vocab_size": 50368}
    config = Config.from_hf({"architectures": ["ModernBertModel"], **stated})
    assert len(config.windows) == theirs.num_hidden_layers
    one_side = theirs.local_attention // 2
    assert [one_side + 1 if kind == "sliding_attention" else None for kind in theirs.layer_types] == [*config.windows]
    assert (config.eps, config.max_position) == (theirs.norm_eps, theirs.max_position_embeddings)
    for rope, kind in ((config.rope, "full_attention"), (config.local_rope, "sliding_attention")):
        assert rope == Rope.from_config({"rope_theta": theirs.rope_parameters[kind]["rope_theta"]}, 64)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "ModernBertForSequenceClassification"])
def test_a_name_alone_is_read_as_a_list_of_one(name: str) -> None:
    from trtllm_jax.models import architecture as module_of

    read = [module_of(each).Config.from_hf(each) for each in (SIZES | {"architectures": one} for one in (name, [name]))]
    assert read[0] == read[1]
    assert read[0].labels == 2
