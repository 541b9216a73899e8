"""Normalisation against float64: by XLA, by the interpreted kernel, and by the compiled one."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
import torch
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.devices import Platform
from pallas_kernels.norm import Norm, add_and_normalise, normalise, pallas_triton, xla

Normalise = Callable[[jax.Array, Norm], jax.Array]
AddAndNormalise = Callable[..., tuple[jax.Array, jax.Array]]

IMPLEMENTATIONS: dict[str, tuple[Normalise, AddAndNormalise]] = {
    "xla": (xla.normalise, xla.add_and_normalise),
    "pallas_triton": (
        partial(pallas_triton.normalise, interpret=True),
        partial(pallas_triton.add_and_normalise, interpret=True),
    ),
    "gpu": (normalise, add_and_normalise),
}
NAMES = ["xla", "pallas_triton", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=NAMES)
def norm(request: pytest.FixtureRequest) -> Normalise:
    return jax.jit(IMPLEMENTATIONS[request.param][0])


@pytest.fixture(params=NAMES)
def add_norm(request: pytest.FixtureRequest) -> AddAndNormalise:
    return jax.jit(IMPLEMENTATIONS[request.param][1])


@pytest.mark.parametrize("shape", [(1, 64), (5, 576), (3, 2, 96), (2, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_have_the_root_mean_square_of_the_weight(
    norm: Normalise, shape: tuple[int, ...], dtype: npt.DTypeLike
) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape) * 3, dtype)
    weight = jnp.asarray(rng.normal(size=shape[-1]), dtype)
    out = norm(x, Norm(weight, 1e-5))
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(weight, np.float64)
    assert (out.shape, out.dtype) == (shape, dtype)
    tolerance = 2**-8 if dtype == jnp.bfloat16 else 2e-6
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=tolerance, atol=1e-6)


def test_eps_keeps_a_row_of_zeros_at_zero(norm: Normalise) -> None:
    assert not norm(jnp.zeros((2, 128)), Norm(jnp.ones(128), 1e-6)).any()


def test_small_rows_feel_eps(norm: Normalise) -> None:
    x = jnp.full((1, 128), 1e-3)
    np.testing.assert_allclose(norm(x, Norm(jnp.ones(128), 1e-6)), x / np.sqrt(2e-6), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 64), (3, 2, 96), (2, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sum_is_returned_and_normalised(
    add_norm: AddAndNormalise, shape: tuple[int, ...], dtype: npt.DTypeLike
) -> None:
    rng = np.random.default_rng(1)
    x, added = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    weight = jnp.asarray(rng.normal(size=shape[-1]), dtype)
    total, normed = add_norm(x, added, Norm(weight, 1e-5))
    assert (total.dtype, normed.dtype) == (dtype, dtype)
    np.testing.assert_array_equal(total, x + added)
    exact = np.asarray(total, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(weight, np.float64)
    # XLA may normalise the sum before it is rounded.
    tolerance = 2**-7 if dtype == jnp.bfloat16 else 2e-6
    np.testing.assert_allclose(np.asarray(normed, np.float64), exact, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 64), (3, 2, 96)], ids=str)
def test_what_is_added_may_be_normalised_first(add_norm: AddAndNormalise, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(4)
    x, added = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    weights = rng.normal(size=(2, shape[-1])).astype(np.float32)
    norms = Norm(jnp.asarray(weights[0]), 1e-5, offset=1.0), Norm(jnp.asarray(weights[1]), 1e-2)

    def exact(rows: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        wide = rows.astype(np.float64)
        return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * weight.astype(np.float64)

    total, normed = add_norm(jnp.asarray(x), jnp.asarray(added), norms[0], added_norm=norms[1])
    np.testing.assert_allclose(total, x + exact(added, weights[1], 1e-2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(normed, exact(np.asarray(total), 1 + weights[0], 1e-5), rtol=1e-5, atol=1e-5)


def test_what_is_added_is_rounded_before_it_is_added() -> None:
    x = jnp.full((1, 64), 256.0, jnp.bfloat16)
    added = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64)), jnp.bfloat16)
    norm, own = Norm(jnp.ones(64), 1e-5), Norm(jnp.full(64, 256.0), 1e-5)
    total, _ = pallas_triton.add_and_normalise(x, added, norm, own, interpret=True)
    np.testing.assert_array_equal(total, x + xla.normalise(added, own))


def test_a_layer_norm_of_what_is_added_leaves_the_rest_to_the_kernel() -> None:
    """On a GPU, where a kernel has no layer norms; it is interpreted here."""
    rng = np.random.default_rng(5)
    x, added = (jnp.asarray(rng.normal(size=(4, 96)), jnp.float32) for _ in range(2))
    norm, added_norm = Norm(jnp.ones(96), 1e-5), Norm(jnp.ones(96), 1e-5, kind="layer")
    expected = xla.add_and_normalise(x, xla.normalise(added, added_norm), norm)
    interpreted = partial(pallas_triton.add_and_normalise, interpret=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_triton, "add_and_normalise", interpreted)
        found = add_and_normalise(x, added, norm, platform=Platform("gpu"), added_norm=added_norm)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_weight_may_be_stored_less_one(norm: Normalise, add_norm: AddAndNormalise) -> None:
    """What is left of 1 + weight in bfloat16 would not be; the sum is made in float32."""
    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(3, 96)), (rng.normal(size=96) / 64).astype(jnp.bfloat16)
    record = Norm(jnp.asarray(weight), 1e-5, offset=1.0)
    exact = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (1 + weight.astype(np.float64))
    half = jnp.asarray(x / 2, jnp.float32)
    np.testing.assert_allclose(norm(2 * half, record), exact, rtol=2e-6)
    np.testing.assert_allclose(add_norm(half, half, record)[1], exact, rtol=2e-6)


@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_norm_is_that_of_torch(biased: bool) -> None:
    """On a GPU too it is XLA's."""
    gpu = Platform("gpu")
    rng = np.random.default_rng(3)
    x, added, weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 96), (4, 96), 96, 96))
    record = Norm(jnp.asarray(weight), 1e-5, bias=jnp.asarray(bias) if biased else None, kind="layer")

    def expected(rows: np.ndarray) -> np.ndarray:
        arrays = map(torch.from_numpy, (rows, weight, bias if biased else np.zeros_like(bias)))
        return torch.nn.functional.layer_norm(next(arrays), (96,), *arrays, eps=1e-5).numpy()

    np.testing.assert_allclose(normalise(jnp.asarray(x), record, platform=gpu), expected(x), rtol=1e-5, atol=1e-5)
    total, normed = add_and_normalise(jnp.asarray(x), jnp.asarray(added), record, platform=gpu)
    np.testing.assert_allclose(total, x + added, rtol=1e-6)
    np.testing.assert_allclose(normed, expected(x + added), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(32, 4096), (16, 8, 4, 96)], ids=str)
def test_the_kernel_lowers_for_a_gpu(shape: tuple[int, ...], offset: float) -> None:
    """Rows of the stream, and heads."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    mesh = AbstractMesh((1,), ("x",), abstract_device=device, axis_types=(AxisType.Auto,))
    x, weight = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct(shape[-1:], jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        run = jax.jit(
            lambda x, weight: pallas_triton.add_and_normalise(x, x, Norm(weight, 1e-5, offset), Norm(weight, 1e-5))
        )
        text = run.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1
