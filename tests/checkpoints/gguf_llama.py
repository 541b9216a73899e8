"""Llama as llama.cpp stores it: the record that these tests read GGUF files with."""

from checkpoints.gguf_architecture import GgufArchitecture

LLAMA = GgufArchitecture(
    name="llama",
    model_type="llama",
    model_class="LlamaForCausalLM",
    permuted={"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"},
)
