"""The Hugging Face rope scaling that a GGUF file's rope factors were computed from."""

import math
from typing import Any

import numpy as np

# The values of every Llama 3.1 to 3.3, which llama.cpp's convert_hf_to_gguf.py assumes too.
_LOW, _HIGH, _TRAINED = 1.0, 4.0, 8192


def as_llama3(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with "llama3" scaling if that gives its factors; otherwise unchanged.

    transformers reads no factors: the `rope_type` "frequency_factors" exists in this library only.
    """
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") != "frequency_factors":
        return config
    found = np.asarray(scaling["factors"])
    factor = float(found.max())
    frequencies = config["rope_theta"] ** -(np.arange(len(found)) / len(found))
    turns = _TRAINED * frequencies / (2 * math.pi)
    blend = np.clip((turns - _LOW) / (_HIGH - _LOW), 0.0, 1.0)
    if not np.allclose(found, 1 / ((1 - blend) / factor + blend), rtol=1e-4):
        return config
    llama3 = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _TRAINED,
    }
    return config | {"rope_scaling": llama3}
