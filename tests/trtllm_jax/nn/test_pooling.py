"""Vectors of whole sequences: what follows a sequence does not matter, whatever it is."""

from __future__ import annotations

from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from trtllm_jax.nn.pooling import How, pooled


@pytest.mark.parametrize("how", get_args(How))
@pytest.mark.parametrize("beyond", [0.0, 1e30, np.nan, np.inf])
def test_padding_counts_for_nothing(how: How, beyond: float) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    lengths = np.array([5, 2, 1], np.int32)
    rows[np.arange(5) >= lengths[:, None]] = beyond
    found = pooled(jnp.asarray(rows), jnp.asarray(lengths), how)
    for row, length, vector in zip(rows, lengths, found, strict=True):
        real = row[:length]
        wanted = {"cls": real[0], "last": real[-1], "mean": real.mean(0)}[how]
        np.testing.assert_allclose(vector, wanted, rtol=1e-6)


@pytest.mark.parametrize("how", get_args(How))
def test_a_row_without_tokens_has_a_finite_vector(how: How) -> None:
    assert np.isfinite(pooled(jnp.ones((1, 2, 3)), jnp.zeros(1, jnp.int32), how)).all()
