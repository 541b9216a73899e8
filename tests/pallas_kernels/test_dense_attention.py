"""Attention within whole sequences against plain float64 attention, and what is handed to cuDNN."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from pallas_kernels.attention import Rotation, Scoring, attend, rotate
from pallas_kernels.devices import Platform

SEQUENCES, TOKENS, HEADS, GROUP, DIM = 2, 13, 3, 2, 8

SCORINGS = {
    "causal": Scoring(DIM**-0.5),
    "window": Scoring(0.4, window=5),
    "soft cap": Scoring(0.7, soft_cap=2.0),
    "window of one": Scoring(1.0, window=1),
    "chunk": Scoring(0.4, chunk=5),
}


ENCODERS = {
    "both ways": Scoring(0.5, causal=False),
    "both ways in a window": Scoring(0.4, window=4, causal=False),
    "both ways, soft cap": Scoring(0.7, soft_cap=2.0, causal=False),
}


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape)


QKV = random(SEQUENCES * TOKENS, HEADS, GROUP + 2, DIM)
ANGLES = random(SEQUENCES * TOKENS, DIM // 2)
ROTATION = Rotation(jnp.cos(ANGLES).astype(jnp.float32), jnp.sin(ANGLES).astype(jnp.float32))
SINKS = random(HEADS, GROUP)
SLOPES = np.abs(random(HEADS, GROUP))


def expected(
    scoring: Scoring, rotation: bool, sinks: bool, lengths: tuple[int, ...] = (), slopes: bool = False
) -> np.ndarray:
    """One query at a time, by the definitions, channel i paired with channel i + d / 2."""
    turned = QKV.copy()
    if rotation:
        pairs = QKV[:, :, : GROUP + 1, : DIM // 2] + 1j * QKV[:, :, : GROUP + 1, DIM // 2 :]
        pairs = pairs * np.exp(1j * ANGLES)[:, None, None]
        turned[:, :, : GROUP + 1] = np.concatenate([pairs.real, pairs.imag], axis=-1)
    out = np.zeros((SEQUENCES * TOKENS, HEADS, GROUP, DIM))
    for token, head, member in np.ndindex(out.shape[:3]):
        first = token - token % TOKENS
        end = token + 1 if scoring.causal else first + (lengths[token // TOKENS] if lengths else TOKENS)
        if scoring.window is not None:
            first, end = max(first, token - scoring.window + 1), min(end, token + scoring.window)
        if scoring.chunk is not None:
            first = token - (token - first) % scoring.chunk
        seen = turned[first:end, head]
        scores = scoring.scale * seen[:, GROUP] @ turned[token, head, member]
        if scoring.soft_cap is not None:
            scores = scoring.soft_cap * np.tanh(scores / scoring.soft_cap)
        if slopes:
            scores = scores - SLOPES[head, member] * np.abs(np.arange(first, end) - token)
        weights = np.exp(scores)
        total = weights.sum() + (np.exp(SINKS[head, member]) if sinks else 0)
        out[token, head, member] = weights @ seen[:, GROUP + 1] / total if len(seen) else np.nan
    return out


@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
@pytest.mark.parametrize(("rotated", "sinks"), [(False, False), (True, False), (False, True)])
def test_every_query_by_itself(scoring: Scoring, rotated: bool, sinks: bool) -> None:
    out = attend(
        jnp.asarray(QKV, jnp.float32),
        SEQUENCES,
        scoring=scoring,
        rotation=ROTATION if rotated else None,
        sinks=jnp.asarray(SINKS) if sinks else None,
    )
    np.testing.assert_allclose(out, expected(scoring, rotated, sinks), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scoring", [*SCORINGS.values(), *ENCODERS.values()], ids=[*SCORINGS, *ENCODERS])
def test_scores_fall_with_the_distance(scoring: Scoring) -> None:
    out = attend(jnp.asarray(QKV, jnp.float32), SEQUENCES, scoring=scoring, slopes=jnp.asarray(SLOPES))
    np.testing.assert_allclose(out, expected(scoring, False, False, slopes=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scoring", ENCODERS.values(), ids=ENCODERS)
def test_a_query_sees_both_ways_but_no_padding(scoring: Scoring) -> None:
    """What lies in the padding may not even be a number."""
    lengths = (TOKENS, 6)
    whole = attend(jnp.asarray(QKV, jnp.float32), SEQUENCES, scoring=scoring, rotation=ROTATION)
    np.testing.assert_allclose(whole, expected(scoring, True, False), rtol=1e-4, atol=1e-5)
    real = np.concatenate([np.arange(TOKENS) < length for length in lengths])
    padded = jnp.where(real[:, None, None, None], jnp.asarray(QKV, jnp.float32), jnp.nan)
    out = attend(padded, SEQUENCES, scoring=scoring, rotation=ROTATION, lengths=jnp.array(lengths))
    np.testing.assert_allclose(out[real], expected(scoring, True, False, lengths)[real], rtol=1e-4, atol=1e-5)


def test_some_channels_may_be_rotated() -> None:
    """Those of the halves of the first four, channel i paired with channel i + 2."""
    angles = ANGLES[:, :2]
    rotation = Rotation(jnp.cos(angles).astype(jnp.float32), jnp.sin(angles).astype(jnp.float32))
    pairs = (QKV[..., :2] + 1j * QKV[..., 2:4]) * np.exp(1j * angles)[:, None, None]
    turned = np.concatenate([pairs.real, pairs.imag, QKV[..., 4:]], axis=-1)
    np.testing.assert_allclose(rotate(jnp.asarray(QKV, jnp.float32), rotation), turned, rtol=1e-4, atol=1e-5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What cuDNN is asked for, which jax's own XLA code computes."""
    calls: list[dict[str, Any]] = []
    compute = jax.nn.dot_product_attention

    def record(*arrays: jax.Array, implementation: str, **options: Any) -> jax.Array:
        calls.append({"implementation": implementation, **options})
        return compute(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return calls


GPU = Platform("gpu")


@pytest.mark.parametrize("scoring", [SCORINGS["causal"], SCORINGS["window"]], ids=["causal", "window"])
def test_a_gpu_asks_cudnn_for_the_same(scoring: Scoring, calls: list[dict[str, Any]]) -> None:
    out = attend(jnp.asarray(QKV, jnp.bfloat16), SEQUENCES, scoring=scoring, rotation=ROTATION, platform=GPU)
    assert [call["implementation"] for call in calls] == ["cudnn"]
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), expected(scoring, True, False), atol=0.06)


@pytest.mark.parametrize(
    ("dtype", "scoring", "sinks"),
    [
        (jnp.float32, SCORINGS["causal"], False),
        (jnp.bfloat16, SCORINGS["soft cap"], False),
        (jnp.bfloat16, SCORINGS["causal"], True),
        (jnp.bfloat16, SCORINGS["chunk"], False),
        (jnp.bfloat16, ENCODERS["both ways"], False),
    ],
)
def test_a_gpu_computes_in_xla_what_cudnn_cannot(
    dtype: npt.DTypeLike, scoring: Scoring, sinks: bool, calls: list[dict[str, Any]]
) -> None:
    added = jnp.asarray(SINKS, jnp.float32) if sinks else None
    out = attend(jnp.asarray(QKV, dtype), SEQUENCES, scoring=scoring, sinks=added, platform=GPU)
    assert calls == []
    np.testing.assert_allclose(np.asarray(out, np.float32), expected(scoring, False, sinks), atol=0.06)


@pytest.mark.parametrize("chosen", [None, "xla"])
def test_xla_may_be_asked_for(chosen: Any, calls: list[dict[str, Any]]) -> None:
    attend(jnp.asarray(QKV, jnp.bfloat16), SEQUENCES, scoring=SCORINGS["causal"], implementation=chosen, platform=GPU)
    assert len(calls) == (chosen is None)


@pytest.mark.parametrize("name", ["chunk", "soft cap"])
def test_cudnn_refuses_what_it_cannot(name: str) -> None:
    with pytest.raises(ValueError, match=r"is causal, has no chunks, soft cap, sinks .*: use implementation='xla'"):
        attend(jnp.asarray(QKV), SEQUENCES, scoring=SCORINGS[name], implementation="cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 33])
def test_cudnn_computes_and_differentiates_as_xla(window: int | None) -> None:
    qkv = jnp.asarray(random(2 * 96, 2, 6, 64), jnp.bfloat16)
    weights = jnp.asarray(random(2 * 96, 2, 4, 64), jnp.float32)

    def score(qkv: jax.Array, implementation: Any) -> jax.Array:
        out = attend(qkv, 2, scoring=Scoring(0.125, window=window), implementation=implementation)
        return (out.astype(jnp.float32) * weights).sum()

    (value, gradient), (expected_value, expected_gradient) = (
        jax.jit(jax.value_and_grad(partial(score, implementation=name)))(qkv) for name in (None, "xla")
    )
    text = jax.jit(partial(score, implementation=None)).lower(qkv).as_text()
    assert "cudnn" in text
    np.testing.assert_allclose(value, expected_value, rtol=0.02, atol=2)
    error = np.linalg.norm(np.asarray(gradient - expected_gradient, np.float32))
    assert error < 0.02 * np.linalg.norm(np.asarray(expected_gradient, np.float32))
