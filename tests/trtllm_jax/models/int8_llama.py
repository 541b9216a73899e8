"""An architecture of the tests: Llama, its products with int8 weights."""

from dataclasses import replace

from checkpoints.table import Weight
from trtllm_jax.models import llama
from trtllm_jax.models.llama import Config, cache_spec, embed, head, last_rows, layer, ropes, same_layer

__all__ = ["INPUTS", "Config", "cache_spec", "embed", "head", "last_rows", "layer", "ropes", "same_layer", "table"]

INPUTS = {"layers.{i}.qkv": 1, "layers.{i}.o": 3, "layers.{i}.gate_up": 1, "layers.{i}.down": 1, "head": 1}
"""How many of its last axes each product contracts."""


def table(config: Config) -> tuple[Weight, ...]:
    return tuple(
        replace(row, format="int8", inputs=INPUTS[row.path]) if row.path in INPUTS else row
        for row in llama.table(config)
    )
