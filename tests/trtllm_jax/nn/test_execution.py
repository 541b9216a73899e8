"""Rules of one's own reach every layer: a model on a mesh of other axes computes what one device does."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from checkpoints.dummy import dummy_params
from checkpoints.table import Params
from pallas_kernels.devices import Platform
from sharding import Repetition, ShardingRules, make_mesh
from trtllm_jax.models import llama
from trtllm_jax.nn.batch import Batch
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.model import Model

CONFIG = llama.Config.from_hf(
    {
        "vocab_size": 25, "hidden_size": 16, "intermediate_size": 18, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4, "attention_bias": True,
    }
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 25, (2, 7)).astype(np.int32)
TABLE = {"vocab": ("x",), "kv_heads": ("y", "x"), "mlp": ("x", "y")}


def parameters(rules: ShardingRules) -> Params:
    extents = rules.extents(CONFIG.sizes)
    return dummy_params(llama.table(CONFIG), extents=extents, rules=rules, dtype=np.float32)


def logits(model: Model, params: Params, tokens: jax.Array) -> jax.Array:
    batch = Batch.of_sequences(tokens, jnp.full(len(tokens), tokens.shape[1]), model.execution)
    x, _ = model.hidden(params, batch)
    return model.logits(params, x)


@pytest.mark.multi_device(4)
def test_axes_split_over_two_mesh_axes() -> None:
    """Heads are repeated over both, and sums of products go over both, while the vocabulary lies on one of them."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rules = ShardingRules(mesh, TABLE)
    assert rules.extents(CONFIG.sizes).repetitions == (Repetition("kv_heads", "group", 2),)
    params = parameters(rules)
    assert params["layers"][0]["down"].sharding.spec == P(None, ("x", "y"))
    mapped = jax.shard_map(
        partial(logits, Model(llama, CONFIG, execution=Execution(rules=rules))),
        mesh=mesh,
        in_specs=(jax.tree.map(lambda leaf: leaf.sharding.spec, params), P()),
        out_specs=P(),
        check_vma=False,
    )
    alone = jax.jit(partial(logits, Model(llama, CONFIG)))(parameters(ShardingRules(make_mesh(1))), TOKENS)
    np.testing.assert_allclose(jax.jit(mapped)(params, TOKENS), alone, rtol=1e-4, atol=1e-5)


def test_that_of_a_mesh() -> None:
    mesh = make_mesh(1)
    found = Execution.on(mesh)
    assert found == Execution(Platform.of(mesh), ShardingRules(mesh))
    assert hash(found) == hash(Execution.on(make_mesh(1)))
    assert (found.implementation, Execution(xla_only=True).implementation) == (None, "xla")
