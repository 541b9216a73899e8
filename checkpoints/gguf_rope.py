"""The rope scaling that a GGUF file states, in the form of a Hugging Face config.json."""

import math
from typing import Any

from checkpoints.error_text import short_repr
from checkpoints.gguf_file import GgufFile
from checkpoints.gguf_header import REMEDY
from checkpoints.gguf_metadata import ArchitectureMetadata
from checkpoints.gguf_names import ROPE_FACTORS


def rope_scaling(file: GgufFile, metadata: ArchitectureMetadata, head_dim: int) -> dict[str, Any] | None:
    """The value of `rope_scaling`, None where rope is not scaled; ValueError where the kind of scaling is unknown."""
    kind = metadata.get("rope.scaling.type") or "none"
    if ROPE_FACTORS in file.tensors:
        if kind != "none":
            raise ValueError(
                f"{file.path} has both {ROPE_FACTORS!r} and rope scaling {short_repr(kind)}; only one is supported"
            )
        return {"rope_type": "frequency_factors", "factors": _factors(file, head_dim)}
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata.number("rope.scaling.factor")}
    if kind == "yarn":
        return _yarn(metadata)
    raise ValueError(f"{file.path} has rope scaling {short_repr(kind)}; supported: none, linear, yarn")


def _factors(file: GgufFile, head_dim: int) -> list[float]:
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.type.name != "F32" or tensor.shape != (head_dim // 2,):
        raise ValueError(
            f"{file.path}: {ROPE_FACTORS!r} is {tensor.type.name} of the shape {tensor.shape}; it must be F32 of the "
            f"shape {(head_dim // 2,)}. {REMEDY}"
        )
    factors: list[float] = file.data(tensor).view("<f4").ravel().tolist()
    if not all(0 < factor < math.inf for factor in factors):
        raise ValueError(
            f"{file.path}: {ROPE_FACTORS!r} is {short_repr(factors)}; it must hold numbers above 0. {REMEDY}"
        )
    return factors


def _yarn(metadata: ArchitectureMetadata) -> dict[str, Any]:
    factor = metadata.number("rope.scaling.factor")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.count("rope.scaling.original_context_length"),
    }
    for field in ("beta_fast", "beta_slow"):
        if metadata.get(f"rope.scaling.yarn_{field}") is not None:
            scaling[field] = metadata.number(f"rope.scaling.yarn_{field}")
    if metadata.get("rope.scaling.attn_factor") is not None:
        # llama.cpp multiplies YaRN's own factor by this one, whereas Hugging Face's value replaces YaRN's.
        own = 0.1 * math.log(factor) + 1.0
        scaling["attention_factor"] = own * metadata.number("rope.scaling.attn_factor")
    return scaling
