"""Quantised weights against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.weights import quantize_int8


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("shape", "inputs"), [((7, 33), 1), ((2, 5, 16), 1), ((6, 3, 2, 8), 3)])
def test_no_weight_is_further_off_than_half_a_step(shape: tuple[int, ...], inputs: int) -> None:
    """A step is the largest weight of an output by 127, and that one stays what it was."""
    weight = random(*shape) * np.exp(random(shape[0])).reshape(-1, *(1,) * (len(shape) - 1))
    quantized = quantize_int8(jnp.asarray(weight), inputs)
    rows = weight.reshape(*shape[: len(shape) - inputs], -1)
    steps = np.abs(rows).max(-1) / 127
    assert (quantized.values.dtype, quantized.shape, quantized.scales.shape) == (jnp.int8, shape, steps.shape)
    np.testing.assert_allclose(quantized.scales, steps, rtol=1e-6)
    values = np.asarray(quantized.values).reshape(rows.shape)
    np.testing.assert_array_equal(np.abs(values).max(-1), 127)
    back = values * np.asarray(quantized.scales)[..., None]
    assert (np.abs(back - rows) <= steps[..., None] * 0.501).all()
    np.testing.assert_allclose(quantized.dequantized(jnp.dtype(jnp.float32)), back.reshape(shape), rtol=1e-6)


def test_the_error_of_normal_weights_is_that_of_uniform_rounding() -> None:
    """A step's error has the variance of a uniform distribution, a twelfth of the step's square."""
    weight = random(64, 4096)
    quantized = quantize_int8(jnp.asarray(weight))
    steps = np.abs(weight).max(1, keepdims=True) / 127
    error = np.asarray(quantized.values) * np.asarray(quantized.scales)[:, None] - weight
    np.testing.assert_allclose(np.sqrt((error**2).mean() / (steps**2).mean()), 12**-0.5, rtol=0.02)


def test_an_output_of_zeros_stays_zero() -> None:
    """Padded heads and channels are such outputs."""
    quantized = quantize_int8(jnp.zeros((3, 8)))
    assert not np.asarray(quantized.dequantized(jnp.dtype(jnp.float32))).any()
    assert np.isfinite(quantized.scales).all()


def test_outputs_may_be_named_otherwise() -> None:
    weight = random(2, 3, 4, 5)
    quantized = quantize_int8(jnp.asarray(weight), inputs=2).reshape(-1, 20)
    assert (quantized.shape, quantized.scales.shape, quantized.ndim) == ((6, 20), (6,), 2)
    np.testing.assert_allclose(
        quantized.dequantized(jnp.dtype(jnp.float32)), weight.reshape(6, 20), atol=np.abs(weight).max() / 250
    )
