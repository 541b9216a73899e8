from __future__ import annotations

from typing import Any

import pytest

from trtllm_jax.nn.config_fields import above_zero, count, model_name


@pytest.mark.parametrize("value", [0, -1.0, 1e-45, 1e39, float("nan"), True, "1"])
def test_numbers_that_are_divided_by_are_above_zero(value: Any) -> None:
    with pytest.raises(ValueError, match=r"cap=.*; it must be a number above 0"):
        above_zero({"cap": value}, "cap")
    assert (above_zero({"cap": 2}, "cap"), above_zero({"cap": None}, "cap"), above_zero({}, "cap")) == (2.0, None, None)


def test_counts_may_be_zero() -> None:
    assert (count({"n": 0}, "n"), count({}, "n", default=3)) == (0, 3)
    with pytest.raises(ValueError, match="n=-1; it must be a whole number from 0 to 7"):
        count({"n": -1}, "n", most=7)


@pytest.mark.parametrize(
    ("stated", "name"),
    [(["Olmo3ForCausalLM"], "Olmo3"), ("Glm4ForSequenceClassification", "Glm4"), ([], ""), (None, "")],
)
def test_a_models_name_is_without_what_it_is_for(stated: Any, name: str) -> None:
    assert model_name({"architectures": stated}) == name
