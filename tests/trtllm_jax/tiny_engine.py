"""An engine of the tiny Llama in the sizes that tests share, so that its programs are compiled once a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtllm_jax import LLM
from trtllm_jax.llmapi import KvCacheConfig

LENGTH = 160
SIZES: dict[str, Any] = {"dtype": "float32", "max_batch_size": 4, "max_num_tokens": 32, "max_seq_len": LENGTH}
CACHE: dict[str, Any] = {"max_tokens": 2048, "tokens_per_block": 8}


def tiny_engine(folder: Path, **more: Any) -> LLM:
    """Arguments beyond these change the programs only where they change a size."""
    return LLM(folder, **{"kv_cache_config": KvCacheConfig(**CACHE), **SIZES, **more})
