"""Hypothesis strategies for logit edits over a small vocabulary."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from hypothesis import strategies as st

from trtllm_jax.engine.logit_edits import LogitEdits
from trtllm_jax.engine.request import Request
from trtllm_jax.requests.sampling_params import SamplingParams

VOCAB = 12

ids = st.integers(0, VOCAB - 1)
texts = st.lists(ids, max_size=14)
bias = st.lists(st.sampled_from([0.0, 0.0, 1.5, -2.0, -np.inf]), min_size=VOCAB, max_size=VOCAB)
some_edits = st.builds(
    LogitEdits,
    bias=st.none() | bias.map(partial(np.array, dtype=np.float32)),
    repetition=st.sampled_from([1.0, 1.3, 0.5]),
    presence=st.sampled_from([0.0, 0.7, -0.5]),
    frequency=st.sampled_from([0.0, 0.25]),
    ignored_prompt=st.integers(0, 16),
    min_tokens=st.integers(0, 6),
    ends=st.frozensets(st.integers(-1, 1 << 40) | ids, max_size=VOCAB),
    no_repeat_ngram=st.integers(0, 3),
    bad=st.lists(st.lists(ids | st.just(VOCAB + 3), min_size=1, max_size=3).map(tuple), max_size=12).map(tuple),
)


def request_of(prompt: Sequence[int], generated: Sequence[int], edits: LogitEdits | None) -> Request:
    """A sequence with these edits that has generated some tokens."""
    request = Request(prompt, 100, SamplingParams().resolved(), edits=edits)
    request.generated += generated
    return request
