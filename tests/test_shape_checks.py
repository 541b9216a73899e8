"""Annotated shapes and dtypes are checked in tests, and nowhere else."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from pallas_kernels import matmul, norm, sampling
from pallas_kernels.weights import QuantizedWeight, quantize_int8
from trtllm_jax.engine import sampler
from trtllm_jax.nn import layers
from trtllm_jax.nn.batch import Batch
from trtllm_jax.nn.rope import Rope, rotation

ROOT = Path(__file__).parents[1]
TOKENS = jnp.zeros(3, jnp.int32)
BATCH = Batch(TOKENS, TOKENS, TOKENS)

WRONG: dict[str, Callable[[], Any]] = {
    "nn: a bias that only broadcasts": lambda: layers.linear(
        jnp.ones((3, 8)), jnp.ones((4, 8)), BATCH, "embed", bias=jnp.ones(1)
    ),
    "nn: positions that are not integers": lambda: rotation(Rope((1.0,)), jnp.ones(3), TOKENS),
    "nn: lengths of other tokens": lambda: rotation(Rope((1.0,)), TOKENS, TOKENS[:2]),
    "kernels: inputs of two sizes": lambda: matmul.linear(jnp.ones((3, 8)), jnp.ones((4, 9))),
    "kernels: a sum of two shapes": lambda: norm.add_and_normalise(
        jnp.ones((3, 8)), jnp.ones((1, 8)), norm.Norm(jnp.ones(8), 1e-5)
    ),
    "kernels: logits of one row without its axis": lambda: sampling.greedy(jnp.ones(8)),
    "sampler: tokens of other rows": lambda: sampler.logprobs(jnp.ones((3, 8)), TOKENS[:2], 1),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_wrong_shape_or_dtype_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeCheckError):
        call()
    with pytest.raises(TypeCheckError):
        jax.eval_shape(call)


def test_a_record_holds_whatever_leaves_jax_gives_it() -> None:
    names = jax.tree.map(str, quantize_int8(jnp.ones((2, 3))))
    assert isinstance(names, QuantizedWeight)
    assert isinstance(names.values, str)


def test_outside_tests_nothing_is_checked() -> None:
    code = """
import inspect, sys
from pallas_kernels import matmul, norm, sampling
from trtllm_jax.engine import sampler
from trtllm_jax.nn import layers, rope
functions = [matmul.linear, norm.normalise, sampling.sample, sampler.logprobs, layers.linear, rope.rotation]
print([name for name in ("beartype", "typeguard") if name in sys.modules])
print([function.__name__ for function in functions if inspect.unwrap(function) is not function])
"""
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).splitlines() == ["[]", "[]"]
    assert inspect.unwrap(layers.linear) is not layers.linear
