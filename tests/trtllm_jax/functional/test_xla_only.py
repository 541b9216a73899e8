"""Which programs hold kernels on a GPU, lowered for one where there is none; and, on a real one, what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels.devices import Platform
from trtllm_jax import generate_fn, load_model
from trtllm_jax.functional.model import Model
from trtllm_jax.models import llama
from trtllm_jax.nn.execution import Execution

H100 = "NVIDIA H100 80GB HBM3"
HOPPER = jax.sharding.AbstractDevice(device_kind=H100, platform="gpu", num_cores=132)
ON_H100 = Execution(Platform("gpu", H100))
KERNELS = ("rms_norm", "skinny_matmul", "decode_attention", "ragged_attention")

# One layer of Llama-3.1-8B, whose matmuls are in the table of what was measured.
CONFIG = llama.Config.from_hf(
    {
        "vocab_size": 2048, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    }
)  # fmt: skip


def lowered(function: Callable[..., Any], *arguments: Any) -> str:
    rows = {row.path.split(".")[-1]: row.axis_names for row in llama.table(CONFIG)}
    sizes = CONFIG.sizes | {"qkv": CONFIG.group + 2, "two": 2}
    leaves = {name: jax.ShapeDtypeStruct([sizes[axis] for axis in axes], jnp.bfloat16) for name, axes in rows.items()}
    top = {name: leaves.pop(name) for name in ("embed", "norm", "head")}
    mesh = AbstractMesh((1,), ("x",), abstract_device=HOPPER, axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function).trace({**top, "layers": (leaves,)}, *arguments)
        text: str = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text


TOKENS = jax.ShapeDtypeStruct((2, 64), np.int32)
KEY = jax.eval_shape(lambda: jax.random.key(0))


def test_the_differentiable_pass_holds_no_kernel() -> None:
    model = Model(llama, CONFIG, attention="xla", execution=ON_H100)
    text = lowered(jax.grad(lambda params, tokens: model.logprobs(params, tokens).sum()), TOKENS)
    assert "stablehlo.dot_general" in text
    assert "triton" not in text


def test_generating_takes_kernels_on_one_gpu_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    model = Model(llama, CONFIG, execution=ON_H100)
    text = lowered(generate_fn(model, 4), TOKENS, None, KEY)
    assert [name for name in ("triton", *KERNELS) if name not in text] == []
    text = lowered(generate_fn(model, 4, kernels=False), TOKENS, None, KEY)
    assert "stablehlo.dot_general" in text
    assert "triton" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [True, False])
def test_greedy_tokens_on_a_gpu(
    tiny_llama: Path, greedy_by_transformers: Callable[[list[int], int], list[int]], kernels: bool
) -> None:
    model, params = load_model(tiny_llama, dtype="float32")
    lengths = np.array([7, 40, 1])
    prompts = np.random.default_rng(0).integers(0, 256, (3, 40))
    with jax.default_matmul_precision("highest"):
        tokens = jax.jit(generate_fn(model, 24, end_ids=(), kernels=kernels))(params, prompts, lengths).tokens
    for row, length in enumerate(lengths):
        assert tokens[row].tolist() == greedy_by_transformers(prompts[row, :length].tolist(), 24)


@pytest.mark.gpu
def test_log_probabilities_and_gradients_on_a_gpu(tiny_llama: Path) -> None:
    """In bfloat16, by cuDNN where it applies, near those of XLA in float32."""
    tokens = np.random.default_rng(0).integers(0, 256, (3, 40))
    found = {}
    for dtype in ("bfloat16", "float32"):
        model, params = load_model(tiny_llama, dtype="bfloat16")
        params = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), params)
        score = jax.jit(jax.value_and_grad(lambda params, model=model: model.logprobs(params, tokens).sum()))
        found[dtype] = score(params)
    (value, gradients), (expected, expected_gradients) = found["bfloat16"], found["float32"]
    np.testing.assert_allclose(value, expected, rtol=0.02)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert np.linalg.norm(np.asarray(ours, np.float32) - theirs) < 0.25 * np.linalg.norm(theirs)
