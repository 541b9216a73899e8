"""Root-mean-square normalisation against float64: by XLA, by the interpreted kernel, and by the compiled one."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from pallas_kernels.norm import add_rms_norm, pallas_triton, rms_norm, xla

Norm = Callable[[jax.Array, jax.Array, float], jax.Array]

AddNorm = Callable[[jax.Array, jax.Array, jax.Array, float], tuple[jax.Array, jax.Array]]

IMPLEMENTATIONS: dict[str, tuple[Norm, AddNorm]] = {
    "xla": (xla.rms_norm, xla.add_rms_norm),
    "pallas_triton": (
        partial(pallas_triton.rms_norm, interpret=True),
        partial(pallas_triton.add_rms_norm, interpret=True),
    ),
    "gpu": (rms_norm, add_rms_norm),
}
NAMES = ["xla", "pallas_triton", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=NAMES)
def norm(request: pytest.FixtureRequest) -> Norm:
    return jax.jit(IMPLEMENTATIONS[request.param][0], static_argnums=2)


@pytest.fixture(params=NAMES)
def add_norm(request: pytest.FixtureRequest) -> AddNorm:
    return jax.jit(IMPLEMENTATIONS[request.param][1], static_argnums=3)


@pytest.mark.parametrize("shape", [(1, 64), (5, 576), (3, 2, 96), (2, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_have_the_root_mean_square_of_the_weight(norm: Norm, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape) * 3, dtype)
    weight = jnp.asarray(rng.normal(size=shape[-1]), dtype)
    out = norm(x, weight, 1e-5)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(weight, np.float64)
    assert (out.shape, out.dtype) == (shape, dtype)
    tolerance = 2**-8 if dtype == jnp.bfloat16 else 2e-6
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=tolerance, atol=1e-6)


def test_eps_keeps_a_row_of_zeros_at_zero(norm: Norm) -> None:
    assert not norm(jnp.zeros((2, 128)), jnp.ones(128), 1e-6).any()


def test_small_rows_feel_eps(norm: Norm) -> None:
    x = jnp.full((1, 128), 1e-3)
    np.testing.assert_allclose(norm(x, jnp.ones(128), 1e-6), x / np.sqrt(2e-6), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 64), (3, 2, 96), (2, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sum_is_returned_and_normalised(add_norm: AddNorm, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
    rng = np.random.default_rng(1)
    x, added = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    weight = jnp.asarray(rng.normal(size=shape[-1]), dtype)
    total, normed = add_norm(x, added, weight, 1e-5)
    assert (total.dtype, normed.dtype) == (dtype, dtype)
    np.testing.assert_array_equal(total, x + added)
    exact = np.asarray(total, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(weight, np.float64)
    # XLA may normalise the sum before it is rounded.
    tolerance = 2**-7 if dtype == jnp.bfloat16 else 2e-6
    np.testing.assert_allclose(np.asarray(normed, np.float64), exact, rtol=tolerance, atol=1e-6)
