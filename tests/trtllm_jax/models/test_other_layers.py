"""What the layers offer beyond Llama, by architectures of the tests that no file of the package implements."""

from collections.abc import Mapping
from typing import ClassVar

from transformers import Gemma2Config, PreTrainedConfig

from . import gemma2_like
from .suite import ModelSuite

SIZES = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


class TestWindowsCapsAndTwoNormsABlock(ModelSuite):
    module = gemma2_like
    configs: ClassVar[Mapping[str, PreTrainedConfig]] = {
        "gemma2": Gemma2Config(
            **SIZES, query_pre_attn_scalar=10, sliding_window=7, attn_logit_softcapping=3.0, final_logit_softcapping=5.0
        )
    }
    served = ("gemma2",)
