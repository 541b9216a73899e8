"""Which tokens a token reads, one pair at a time."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Scoring
from trtllm_jax.nn.reach import EVERYTHING, Reach


@pytest.mark.parametrize(
    ("reach", "most"),
    [(EVERYTHING, None), (Reach(window=1), 1), (Reach(window=4), 4), (Reach(chunk=1), 1), (Reach(chunk=4), 4)],
)
def test_the_first_token_that_is_read_is_the_first_that_attention_sees(reach: Reach, most: int | None) -> None:
    """Pages are freed by the one and read by the other."""
    places = jnp.arange(13)
    scoring = Scoring(1.0, window=reach.window, chunk=reach.chunk)
    seen = np.asarray(scoring.visible(places[:, None], places))
    assert [reach.first(position) for position in range(13)] == seen.argmax(axis=1).tolist()
    assert reach.most == most
    assert seen.sum(axis=1).max() == (most or 13)


def test_a_token_has_one_limit() -> None:
    with pytest.raises(ValueError, match=r"reads window=4 or chunk=8, not both: leave one None"):
        Reach(window=4, chunk=8)
