from __future__ import annotations

import copy
from typing import Any, ClassVar

import jax.numpy as jnp
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from sharding import make_mesh
from trtllm_jax.engine.kv_cache import CacheSpec
from trtllm_jax.models.nemotron_nas import Config, cache_spec, same_layer, table

from .suite import ModelSuite


class NemotronNasConfig(LlamaConfig):
    """Llama's configuration with what each layer has."""

    model_type = "nemotron-nas"
    block_configs: list[dict[str, Any]] | None = None


class ProductOfHiddenStates(torch.nn.Module):
    """One linear layer in the place of a block, under the name that checkpoints have for it."""

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.add_module(name, torch.nn.Linear(channels, channels, bias=False))

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        (product,) = self.children()
        return product(hidden_states), None


class NemotronNasLayer(torch.nn.Module):
    """Transformers' attention and feed-forward block of Llama, each with this layer's size, replaced or left out."""

    def __init__(self, config: NemotronNasConfig, index: int) -> None:
        super().__init__()
        attention, ffn = config.block_configs[index]["attention"], config.block_configs[index]["ffn"]
        own, channels = copy.deepcopy(config), config.hidden_size
        self.self_attn = self.mlp = None
        if not attention["no_op"]:
            self.input_layernorm = LlamaRMSNorm(channels, config.rms_norm_eps)
            if attention["replace_with_linear"]:
                self.self_attn = ProductOfHiddenStates("linear_attn", channels)
            else:
                own.num_key_value_heads = config.num_attention_heads // attention["n_heads_in_group"]
                self.self_attn = LlamaAttention(own, index)
        if not ffn["no_op"]:
            self.post_attention_layernorm = LlamaRMSNorm(channels, config.rms_norm_eps)
            if ffn["replace_with_linear"]:
                self.mlp = ProductOfHiddenStates("linear_mlp", channels)
            else:
                exact = int(2 * ffn["ffn_mult"] * channels / 3)
                own.intermediate_size = next(size for size in range(256, 9999, 256) if size >= exact)
                self.mlp = LlamaMLP(own)

    def forward(self, hidden_states: torch.Tensor, **of_attention: Any) -> torch.Tensor:
        if self.self_attn is not None:
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **of_attention)
            hidden_states = hidden_states + attended
        if self.mlp is not None:
            output = self.mlp(self.post_attention_layernorm(hidden_states))
            hidden_states = hidden_states + (output[0] if isinstance(output, tuple) else output)
        return hidden_states


class DeciLMForCausalLM(LlamaForCausalLM):
    """The reference: Llama with these layers, under the architecture's name in config.json."""

    config_class = NemotronNasConfig

    def __init__(self, config: NemotronNasConfig) -> None:
        super().__init__(config)
        layers = (NemotronNasLayer(config, index) for index in range(config.num_hidden_layers))
        self.model.layers = torch.nn.ModuleList(layers)


AutoConfig.register("nemotron-nas", NemotronNasConfig)
AutoModelForCausalLM.register(NemotronNasConfig, DeciLMForCausalLM)

NOTHING = "nothing"


def block(attention: int | str, ffn: float | str) -> dict[str, Any]:
    """A record of `block_configs`: each of both with a size, "linear", or `NOTHING`."""

    def part(name: str, size: float | str) -> dict[str, Any]:
        stated = None if isinstance(size, str) else size
        return {name: stated, "no_op": size == NOTHING, "replace_with_linear": size == "linear", "sparsify": None}

    of_attention = part("n_heads_in_group", attention) | {"window_length": None, "num_sink_tokens": None}
    return {"attention": of_attention | {"unshifted_sink": False}, "ffn": part("ffn_mult", ffn)}


def config(*blocks: dict[str, Any], **fields: Any) -> NemotronNasConfig:
    """Heads that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "num_attention_heads": 6, "max_position_embeddings": 64,
        "num_hidden_layers": len(blocks), "block_configs": list(blocks),
    }  # fmt: skip
    return NemotronNasConfig(**copy.deepcopy(sizes | fields))


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
BLOCKS = (block(2, 8.0), block(NOTHING, 9.5), block("linear", "linear"), block(6, NOTHING), block(2, 8.0))


class TestNemotronNas(ModelSuite):
    configs: ClassVar = {
        "layers of all kinds": config(*BLOCKS, rope_parameters=LLAMA3),
        "layers that have nothing, repeated heads, tied": config(
            block(4, 8.0),
            block(NOTHING, NOTHING),
            block(2, NOTHING),
            num_attention_heads=8,
            tie_word_embeddings=True,
        ),
    }
    served = ("layers of all kinds",)
    slow = ("layers that have nothing, repeated heads, tied",)


HF: dict[str, Any] = config(*BLOCKS).to_dict()


def test_hidden_channels_are_rounded_up() -> None:
    """By the factors and the channels of Llama-3.3-Nemotron-Super-49B."""
    factors = [2.625, 1.3125, 0.5, 5.25]
    stated = HF | {"hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 4}
    read = Config.from_hf(stated | {"block_configs": [block(8, factor) for factor in factors]})
    assert [of_layer.mlp for of_layer in read.blocks] == [14336, 7168, 2816, 28672]


def test_published_files_state_no_sizes_of_all_layers() -> None:
    assert Config.from_hf(HF | {"num_key_value_heads": None, "intermediate_size": None}) == Config.from_hf(HF)


def test_layers_of_each_number_of_heads_have_a_cache_of_their_own() -> None:
    """And those without attention have none: the memory of a token is that of three layers of five."""
    model = Config.from_hf(HF)
    spec = CacheSpec.of(cache_spec(model), model.sizes, 4, jnp.dtype("float32"), make_mesh(1))
    assert [group.layers for group in spec.groups] == [(0, 4), (3,)]
    assert [array.shape[2] for array in spec.arrays((5, 5))] == [3, 1, 3]
    assert [same_layer(model, index) for index in range(5)] == [0, 1, 2, 3, 0]


def test_layers_that_have_nothing_are_left_out() -> None:
    read = Config.from_hf(config(block(2, 8.0), block(NOTHING, NOTHING), block(2, 8.0)).to_dict())
    assert (read.num_layers, [of_layer.stored for of_layer in read.blocks]) == (2, [0, 2])


def changed(part: str, **fields: Any) -> dict[str, Any]:
    """The configuration with other fields in the first layer's record."""
    first = copy.deepcopy(BLOCKS[0])
    first[part] |= fields
    return {"block_configs": [first, *BLOCKS[1:]]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"attention_bias": True}, r"attention_bias=True; supported here: False"),
        ({"mlp_bias": True}, r"mlp_bias=True; supported here: False"),
        ({"position_embedding_type": "mistral_yarn"}, r"position_embedding_type='mistral_yarn'; supported"),
        ({"block_configs": None}, r"block_configs=None; it must be a list of num_hidden_layers=5 objects"),
        ({"block_configs": [1] * 5}, r"block_configs\[0\].attention=None; it must be an object"),
        ({"block_configs": [block(NOTHING, 8.0)] * 5}, r"block_configs without attention in any layer"),
        ({"hidden_size": None}, r"lacks hidden_size"),
        ({"hidden_size": 50}, r"hidden_size=50 is not a multiple of num_attention_heads=6"),
        (changed("attention", num_sink_tokens=4), r"block_configs\[0\].attention.num_sink_tokens=4; supported here: "),
        (changed("attention", window_length=64), r"block_configs\[0\].attention.window_length=64; supported here: "),
        (changed("ffn", sparsify=["x"]), r"block_configs\[0\].ffn.sparsify=\['x'\]; supported here: None"),
        (changed("attention", no_op=1), r"block_configs\[0\].attention.no_op=1; it must be true or false"),
        (changed("attention", n_heads_in_group=4), r"num_attention_heads=6 is not a multiple of block_configs\[0\]"),
        (changed("attention", n_heads_in_group=None), r"lacks block_configs\[0\].attention.n_heads_in_group"),
        (changed("ffn", ffn_mult=None), r"lacks block_configs\[0\].ffn.ffn_mult"),
        (changed("ffn", ffn_mult=-1.0), r"block_configs\[0\].ffn.ffn_mult=-1.0; it must be a number above 0"),
    ],
)  # fmt: skip
def test_fields_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)


def test_a_layer_behind_one_that_is_left_out_keeps_the_checkpoints_number() -> None:
    read = Config.from_hf(config(block(2, 8.0), block(NOTHING, NOTHING), block(2, 8.0)).to_dict())
    stored = {tensor.name for row in table(read) for tensor in row.stored}
    assert any(name.startswith("model.layers.2.") for name in stored)
    assert not any(name.startswith("model.layers.1.") for name in stored)
