"""What the layers offer beyond Llama lowers for a GPU where there is none, and no host waits for it."""

from __future__ import annotations

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

from checkpoints.table import param_shapes
from pallas_kernels.attention import cache_shape
from pallas_kernels.devices import Platform
from sharding import Extents, ShardingRules, make_mesh
from trtllm_jax.models import gemma2, qwen3
from trtllm_jax.nn.batch import Batch, Caches, RaggedRows
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.model import Model

from . import int8_llama

H100 = "NVIDIA H100 80GB HBM3"
HOPPER = AbstractMesh(
    (1,), ("x",), axis_types=(AxisType.Auto,),
    abstract_device=AbstractDevice(device_kind=H100, platform="gpu", num_cores=132),
)  # fmt: skip
ROWS, PAGES, PAGE_SIZE = 8, 16, 32
# The matmuls of Llama-3.1-8B, which are in the table of what was measured.
SIZES = {
    "vocab_size": 1024, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip


def lowered(model: Model, tokens: int) -> str:
    """A step of eight rows, which decode if they own one token each."""
    how = model.execution

    def step(params: object, caches: Caches, ids: jax.Array, first: jax.Array, table: jax.Array) -> tuple:
        tables = (table,) * len(model.cache_groups)
        if tokens == ROWS:
            batch = Batch.of_decoding_rows(ids, first, first > 0, tables, PAGE_SIZE, execution=how)
        else:
            rows = RaggedRows.of(tokens, jnp.arange(ROWS + 1) * (tokens // ROWS), first, first >= 0)
            batch = Batch.of_ragged_rows(ids, rows, tables, first + tokens, PAGE_SIZE, execution=how)
        x, caches = model.hidden(params, batch, caches)
        return model.logits(params, x[:ROWS]), caches

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32)

    extents, rules = Extents(model.config.sizes), ShardingRules(make_mesh(1))
    shapes = param_shapes(model.module.table(model.config), extents=extents, rules=rules, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
    caches = (jax.ShapeDtypeStruct(cache_shape(200, 8, PAGE_SIZE, 128), jnp.bfloat16),) * 2
    arguments = (params, caches, integers(tokens), integers(ROWS), integers(ROWS, PAGES))
    with jax.sharding.use_abstract_mesh(HOPPER):
        text: str = jax.jit(step, donate_argnums=1).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text


@pytest.mark.parametrize("tokens", [ROWS, 16, 2048])
@pytest.mark.parametrize(
    ("module", "config"),
    [
        pytest.param(gemma2, Gemma2Config(**SIZES), id="gemma2"),
        pytest.param(qwen3, Qwen3Config(**SIZES), id="qwen3"),
        pytest.param(int8_llama, LlamaConfig(**SIZES), id="int8"),
    ],
)
def test_steps(module: ModuleType, config: PreTrainedConfig, tokens: int) -> None:
    execution = Execution(Platform("gpu", H100))
    text = lowered(Model(module, module.Config.from_hf(config.to_dict()), execution=execution), tokens)
    assert "stablehlo.while" not in text
    assert "stablehlo.case" not in text
    assert "rms_norm" in text
    assert ("decode_attention" in text) == (tokens == ROWS)
    by_hopper = tokens == 2048 and module is not gemma2
    assert ("ragged_attention" in text) == (tokens != ROWS and not by_hopper)
    assert ("skinny_matmul" in text) == (tokens < 2048 and module is not int8_llama), (
        "the products of quantised weights are XLA's"
    )
