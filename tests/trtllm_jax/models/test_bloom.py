from __future__ import annotations

import copy
from typing import Any, ClassVar

import numpy as np
import pytest
from transformers import BloomConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from trtllm_jax.models.bloom import Config
from trtllm_jax.nn.alibi import alibi_slopes

from .suite import ModelSuite


def config(**fields: Any) -> BloomConfig:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {"vocab_size": 101, "hidden_size": 48, "n_layer": 2, "n_head": 6, "seq_length": 64}
    return BloomConfig(**copy.deepcopy(sizes | fields))


class TestBloom(ModelSuite):
    configs: ClassVar = {
        "6 heads": config(),
        "8 heads, the residual is normalised": config(n_head=8, apply_residual_connection_post_layernorm=True),
        "untied": config(tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    }
    served = ("6 heads",)
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 31, 112])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    import torch

    found = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32).numpy()[:, 0, 1]
    np.testing.assert_allclose(alibi_slopes(heads)[:, 0], found, rtol=1e-5)
    mpts = build_mpt_alibi_tensor(heads, 2).numpy()[:, 0, 0]
    np.testing.assert_allclose(alibi_slopes(heads)[:, 0], -mpts, rtol=1e-5)


def test_older_files_have_other_names() -> None:
    older = {"n_embed": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 101, "seq_length": 64}
    assert Config.from_hf(older) == Config.from_hf(HF)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slow_but_exact": True}, "slow_but_exact=True"),
        ({"hidden_size": 50}, r"hidden_size=50 is not a multiple of num_attention_heads=6"),
        ({"apply_residual_connection_post_layernorm": 1}, "apply_residual_connection_post_layernorm=1"),
        ({"n_head": "6"}, "num_attention_heads='6'"),
        ({"hidden_size": None, "n_embed": None}, "hidden_size"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
