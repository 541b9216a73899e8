"""Whole steps lowered for a GPU where there is none, so that a kernel that does not lower is found here."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from checkpoints.table import param_shapes
from pallas_kernels.attention import cache_shape
from pallas_kernels.devices import Platform
from sharding import Extents, ShardingRules, make_mesh
from trtllm_jax.engine import steps
from trtllm_jax.engine.grammar import mask_words
from trtllm_jax.engine.penalties import Penalties
from trtllm_jax.engine.row_state import RowState
from trtllm_jax.engine.steps import Draw
from trtllm_jax.models import llama
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.model import Model

H100 = "NVIDIA H100 80GB HBM3"
HOPPER = jax.sharding.AbstractDevice(device_kind=H100, platform="gpu", num_cores=132)
# Two layers of Llama-3.1-8B: its matmuls are in the table of what was measured.
CONFIG = {
    "vocab_size": 5120, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "hidden_act": "silu",
}  # fmt: skip
SLOTS, PAGES = 256, 16


def penalties(model: Model) -> Any:
    return jax.eval_shape(partial(Penalties.empty, SLOTS, model.config.vocab, PAGES * 32))


def lowered(step: Any, layout: steps.Layout, model: Model, *others: object) -> str:
    caches = (jax.ShapeDtypeStruct(cache_shape(600, 8, 32, 128), jnp.bfloat16),) * 2
    state = jax.eval_shape(partial(RowState.empty, SLOTS, (PAGES,)))
    return lowered_with(jax.jit(step, donate_argnums=(1, 2)), layout, model, caches, state, *others)


def lowered_with(step: Any, layout: steps.Layout, model: Model, *others: object) -> str:
    """A compiled function of the weights, of others, and of what is packed."""
    extents, rules = Extents(model.config.sizes), ShardingRules(make_mesh(1))
    shapes = param_shapes(llama.table(model.config), extents=extents, rules=rules, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
    mesh = AbstractMesh((1,), ("x",), abstract_device=HOPPER, axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = step.trace(params, *others, jax.ShapeDtypeStruct((layout.size,), np.int32))
        text: str = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(llama, llama.Config.from_hf(CONFIG), execution=Execution(Platform("gpu", H100)))


@pytest.mark.parametrize("how", [Draw(False, 0), Draw(True, 0), Draw(True, 1), Draw(True, 8), Draw(True, 256)], ids=str)
@pytest.mark.parametrize("rows", [8, 256, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (1, 64, 128))])
def test_decode_steps(model: Model, rows: int, how: Draw) -> None:
    how = how._replace(extras=min(how.extras or 0, rows))
    known, loop = ((penalties(model),), steps.decode_loop_with_extras) if how.extras else ((), steps.decode_loop)
    layout = steps.decode_layout(rows, 1, 1, how)
    text = lowered(partial(loop, model, layout, how, 1, 32), layout, model, *known)
    assert "stablehlo.while" not in text, "a loop that the data ends makes the host wait"
    assert "stablehlo.case" not in text, "and so does a branch that the data chooses"
    assert ("_narrow" in text) == how.sampled, "greedy rows alone take no kernel that samples"
    assert "decode_attention" in text
    assert "skinny_matmul" in text
    assert "rms_norm" in text


def test_several_iterations_of_a_decode_step(model: Model) -> None:
    """Unrolled, as many as the program has: nothing decides how many run."""
    how = Draw(False, 0)
    layout = steps.decode_layout(8, 1, 1, how)
    texts = [lowered(partial(steps.decode_loop, model, layout, how, count, 32), layout, model) for count in (1, 4)]
    assert "stablehlo.while" not in texts[1]
    assert "stablehlo.case" not in texts[1]
    calls = [len(re.findall(r"call @layer", text)) for text in texts]
    assert calls == [2, 8], "two layers an iteration"


@pytest.mark.parametrize("tokens", [16, 128, 2048])
def test_ragged_steps(model: Model, tokens: int) -> None:
    layout = steps.ragged_layout(tokens, min(tokens, SLOTS), (PAGES,))
    text = lowered(partial(steps.ragged_step, model, layout, 32), layout, model)
    assert ("mosaic_gpu" in text) == (tokens >= 128), "matmuls of 128 rows, attention of 1,024 tokens"
    assert ("ragged_attention" in text) == (tokens < 1024)
    assert "stablehlo.case" not in text, "a branch that the data chooses makes the host wait"
    assert "stablehlo.while" not in text


@pytest.mark.parametrize(("rows", "room"), [(16, 8), (16, 16), (256, 256)])
def test_extras_of_a_ragged_step(model: Model, rows: int, room: int) -> None:
    layout = steps.extras_layout(rows)
    state = jax.eval_shape(partial(RowState.empty, SLOTS, (PAGES,)))
    last, out = jax.ShapeDtypeStruct((SLOTS, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((rows, 2), jnp.int32)
    step = jax.jit(partial(steps.ragged_extras, model, layout, room))
    text = lowered_with(step, layout, model, state, penalties(model), last, out)
    assert "stablehlo.case" not in text, "a branch that the data chooses makes the host wait"
    assert "stablehlo.while" not in text


@pytest.mark.parametrize("rows", [16, 256])
def test_edited_draws(model: Model, rows: int) -> None:
    layout = steps.edited_layout(rows)
    last = jax.ShapeDtypeStruct((SLOTS, 4096), jnp.bfloat16)
    words = jax.ShapeDtypeStruct((rows, mask_words(model.config.vocab)), np.int32)
    text = lowered_with(jax.jit(partial(steps.edited_draw, model, layout)), layout, model, last, words)
    assert "stablehlo.scatter" in text
    assert "stablehlo.case" not in text, "a branch that the data chooses makes the host wait"
    assert "stablehlo.while" not in text
