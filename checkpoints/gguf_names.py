"""The Hugging Face names of a GGUF file's tensors."""

import re

from checkpoints.gguf_architecture import GgufArchitecture

ROPE_FACTORS = "rope_freqs.weight"
"""A tensor of every architecture that is part of the configuration, not a weight."""

MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}
"""The modules that most architectures have; `{i}` is the layer."""


def hugging_face_name(name: str, architecture: GgufArchitecture) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown name is kept, so that loading reports it as unused."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None:
        return name
    layer, module, kind = match.groups()
    key = module if layer is None else f"blk.{{i}}.{module}"
    found = architecture.tensors.get(key) or MODULES.get(key)
    return name if found is None else f"{found.replace('{i}', layer or '')}.{kind}"
