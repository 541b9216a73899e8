"""A GGUF file's rope factors as the Hugging Face configuration that they were computed from."""

import math
from typing import Any

import numpy as np

# What every Llama 3.1 to 3.3 has; llama.cpp's convert_hf_to_gguf.py assumes it too.
_LOW, _HIGH, _TRAINED = 1.0, 4.0, 8192


def as_llama3(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with "llama3" scaling in the place of the factors that follow from it; other factors stay as they are.

    transformers knows no factors: a configuration that keeps them, `rope_type` "frequency_factors", is ours alone.
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
