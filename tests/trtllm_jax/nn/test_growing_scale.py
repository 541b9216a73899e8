from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from trtllm_jax.nn.growing_scale import GrowingScale


@pytest.mark.parametrize("rounded", [True, False])
def test_the_factor_is_rounded_before_the_product_or_not(rounded: bool) -> None:
    """1 + 0.1 log 2 is 1.0693, and 1.0703 in bfloat16; three times that differ in bfloat16 too."""
    qkv = jnp.full((1, 1, 3, 2), 3, jnp.bfloat16)
    out = GrowingScale(0.1, 4, rounded).scaled(qkv, jnp.array([5], jnp.int32))
    factor = np.float32(1 + 0.1 * np.log(2))
    factor = np.float32(factor.astype(jnp.bfloat16)) if rounded else factor
    expected = np.float32(3 * factor).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(out[0, 0, 0], np.float32), np.float32(expected))
    np.testing.assert_array_equal(np.asarray(out[0, 0, 1:], np.float32), 3)
