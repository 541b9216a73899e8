"""The GGUF architectures that are read: their Hugging Face names and configuration. Another one is another entry."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoints.gguf_file import REMEDY, GgufFile
from checkpoints.shown import shown

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """What differs between architectures.

    `permuted` maps the modules whose rows llama.cpp stores with the two halves of each head interleaved
    (`LlamaModel.permute` in its convert_hf_to_gguf.py) to the configuration's number of heads.
    """

    model_type: str
    model_class: str
    permuted: Mapping[str, str]


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        model_type="llama",
        model_class="LlamaForCausalLM",
        permuted={"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"},
    ),
}


def architecture_of(file: GgufFile) -> Architecture:
    """The entry of the file's architecture; ValueError, with those supported, where there is none."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"{file.path} has the architecture {shown(name)}; supported in GGUF: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def hugging_face_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name we do not know stays, so that loading reports it as unused."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, module, kind = match.groups()
        if module in _LAYER_MODULES:
            return f"model.layers.{layer}.{_LAYER_MODULES[module]}.{kind}"
    elif match := re.fullmatch(r"(\w+)\.(weight|bias)", name):
        module, kind = match.groups()
        if module in _MODULES:
            return f"{_MODULES[module]}.{kind}"
    return name


def model_config(file: GgufFile) -> dict[str, Any]:
    """The model's configuration in the form of a Hugging Face config.json."""
    architecture = architecture_of(file)
    read = _Metadata(file)
    if experts := read.count("expert_count", default=0, least=0):
        raise ValueError(f"{file.path} has {experts} experts; mixture-of-experts models are not read from GGUF")
    hidden, heads = read.count("embedding_length"), read.count("attention.head_count")
    head_dim = read.count("attention.key_length", default=hidden // heads)
    rotary = read.count("rope.dimension_count", default=head_dim)
    if rotary != head_dim:
        raise ValueError(f"{file.path} rotates {rotary} of {head_dim} head dimensions; only whole heads are supported")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} has no tensor 'token_embd.weight': it is not a language model's file")
    config = {
        "model_type": architecture.model_type,
        "architectures": [architecture.model_class],
        "hidden_size": hidden,
        "intermediate_size": read.count("feed_forward_length"),
        "num_hidden_layers": read.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.count("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": read.number("rope.freq_base", default=10000.0),
        "rope_scaling": _rope_scaling(file, read, head_dim),
        "max_position_embeddings": read.count("context_length"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }
    for kind in ("bos", "eos"):
        config[f"{kind}_token_id"] = file.integer(f"tokenizer.ggml.{kind}_token_id")
    return config


def generation_config(file: GgufFile) -> dict[str, Any]:
    """The file's token ids in the form of a generation_config.json: `eos_token_id` lists all that end a sequence."""

    def stated(kind: str) -> int | None:
        return file.integer(f"tokenizer.ggml.{kind}_token_id")

    ends = dict.fromkeys(stated(kind) for kind in ("eos", "eot", "eom") if stated(kind) is not None)
    config = {"bos_token_id": stated("bos"), "eos_token_id": list(ends) or None, "pad_token_id": stated("padding")}
    return {key: value for key, value in config.items() if value is not None}


class _Metadata:
    """The architecture's own metadata: "block_count" is "llama.block_count"."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._prefix = file.metadata["general.architecture"]

    def get(self, key: str) -> Any:
        return self._file.metadata.get(f"{self._prefix}.{key}")

    def count(self, key: str, *, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least`, below 2**31; ValueError otherwise, or where there is none and no default."""
        value = self._stated(key, default)
        if type(value) is not int or not least <= value < 2**31:
            raise ValueError(
                f"{self._file.path}: '{self._prefix}.{key}' is {shown(value)}; it must be a whole number of at least "
                f"{least}. {REMEDY}"
            )
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """A number above 0; ValueError otherwise, or where there is none and no default."""
        value = self._stated(key, default)
        # Within float32's range, which is what metadata has; NaN is in no range.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-38 < value < 1e38:
            raise ValueError(
                f"{self._file.path}: '{self._prefix}.{key}' is {shown(value)}; it must be a number above 0. {REMEDY}"
            )
        # 1e-5 in float32 would come out as 9.999999747378752e-06.
        return float(str(np.float32(value)))

    def _stated(self, key: str, default: float | None) -> Any:
        value = self.get(key)
        return default if value is None else value


def _rope_scaling(file: GgufFile, read: _Metadata, head_dim: int) -> dict[str, Any] | None:
    kind = read.get("rope.scaling.type") or "none"
    if ROPE_FACTORS in file.tensors:
        if kind != "none":
            raise ValueError(
                f"{file.path} has both {ROPE_FACTORS!r} and rope scaling {shown(kind)}; only one is supported"
            )
        return {"rope_type": "frequency_factors", "factors": _rope_factors(file, head_dim)}
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": read.number("rope.scaling.factor")}
    if kind == "yarn":
        return _yarn(read)
    raise ValueError(f"{file.path} has rope scaling {shown(kind)}; supported: none, linear, yarn")


def _rope_factors(file: GgufFile, head_dim: int) -> list[float]:
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.type.name != "F32" or tensor.shape != (head_dim // 2,):
        raise ValueError(
            f"{file.path}: {ROPE_FACTORS!r} is {tensor.type.name} of the shape {tensor.shape}; it must be F32 of the "
            f"shape {(head_dim // 2,)}. {REMEDY}"
        )
    factors: list[float] = file.data(tensor).view("<f4").ravel().tolist()
    if not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f"{file.path}: {ROPE_FACTORS!r} is {shown(factors)}; it must hold numbers above 0. {REMEDY}")
    return factors


def _yarn(read: _Metadata) -> dict[str, Any]:
    factor = read.number("rope.scaling.factor")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": read.count("rope.scaling.original_context_length"),
    }
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if read.get(f"rope.scaling.{theirs}") is not None:
            scaling[ours] = read.number(f"rope.scaling.{theirs}")
    if read.get("rope.scaling.attn_factor") is not None:
        # llama.cpp multiplies YaRN's own factor by it; Hugging Face's value replaces that factor.
        own = 0.1 * math.log(factor) + 1.0
        scaling["attention_factor"] = own * read.number("rope.scaling.attn_factor")
    return scaling
