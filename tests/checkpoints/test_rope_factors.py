from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from checkpoints.rope_factors import as_llama3


def llama_cpp_factors(factor: float, base: float, head_dim: int) -> list[float]:
    """`generate_extra_tensors` of LlamaModel in llama.cpp's convert_hf_to_gguf.py."""
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (i / head_dim)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192 / 1:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.float32(found).tolist()


def config_with(scaling: dict[str, Any] | None) -> dict[str, Any]:
    return {"rope_theta": 500000.0, "rope_scaling": scaling, "head_dim": 128, "max_position_embeddings": 131072}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_by_its_factors(factor: float) -> None:
    factors = llama_cpp_factors(factor, 500000.0, 128)
    found = as_llama3(config_with({"rope_type": "frequency_factors", "factors": factors}))
    theirs = LlamaRotaryEmbedding(LlamaConfig(**found, hidden_size=4096, num_attention_heads=32))
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(theirs.inv_freq.numpy(), plain / np.array(factors), rtol=1e-5)


@pytest.mark.parametrize(
    "scaling",
    [None, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "frequency_factors", "factors": [1.0, 1.5] * 32}],
)
def test_anything_else_stays(scaling: dict[str, Any] | None) -> None:
    config = config_with(scaling)
    assert as_llama3(config) == config
