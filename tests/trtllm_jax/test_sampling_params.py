"""TensorRT-LLM's defaults and greedy rule, and an error with field, value and remedy for everything that is wrong."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_jax.sampling_params import Sampling, SamplingParams

TENSORRT_LLM_DEFAULTS = {
    "max_tokens": 32,
    "n": 1,
    "beam_width": 1,
    "detokenize": True,
    "add_special_tokens": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "exclude_input_from_output": True,
    "include_stop_str_in_output": False,
    "apply_batched_logits_processor": False,
    "use_beam_search": False,
    "return_context_logits": False,
    "return_generation_logits": False,
    "return_encoder_output": False,
    "return_perf_metrics": False,
    "ignore_eos": False,
}
NONE_BY_DEFAULT = [
    "end_id",
    "pad_id",
    "bad",
    "bad_token_ids",
    "stop",
    "stop_token_ids",
    "embedding_bias",
    "logits_processor",
    "best_of",
    "top_k",
    "top_p",
    "temperature",
    "top_p_min",
    "top_p_reset_ids",
    "top_p_decay",
    "seed",
    "min_tokens",
    "beam_search_diversity_rate",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "length_penalty",
    "early_stopping",
    "beam_width_array",
    "no_repeat_ngram_size",
    "min_p",
    "logprobs",
    "prompt_logprobs",
    "additional_model_outputs",
    "lookahead_config",
    "guided_decoding",
    "truncate_prompt_tokens",
]
GREEDY = Sampling(temperature=1.0, top_k=1, top_p=1.0, min_p=0.0, seed=None, greedy=True)


def message(**arguments: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - every caller checks the text
        SamplingParams(**arguments)
    return str(error.value)


def test_defaults_are_tensorrt_llms() -> None:
    params = SamplingParams()
    assert {name: getattr(params, name) for name in TENSORRT_LLM_DEFAULTS} == TENSORRT_LLM_DEFAULTS
    assert [name for name in NONE_BY_DEFAULT if getattr(params, name) is not None] == []


def test_the_manuals_calls_work() -> None:
    SamplingParams(max_tokens=100, temperature=0.8, top_p=0.9)
    SamplingParams(max_tokens=150, temperature=0.7, length_penalty=1.0)
    SamplingParams(max_tokens=10, temperature=1.0, top_p=1.0, top_k=0, beam_width=1)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"min_p": 0.1},
        {"top_k": 1},
        {"top_p": 0.0},
        {"top_p": 0},
        {"temperature": 0.0},
        {"temperature": 0, "top_k": 9},
    ],
)
def test_greedy(arguments: dict[str, Any]) -> None:
    assert SamplingParams(**arguments).greedy
    assert SamplingParams(**arguments).resolved() == GREEDY


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"temperature": 0.8}, Sampling(0.8, 0, 1.0, 0.0, None, greedy=False)),
        ({"top_k": 0}, Sampling(1.0, 0, 1.0, 0.0, None, greedy=False)),
        ({"top_k": 5, "seed": 7}, Sampling(1.0, 5, 1.0, 0.0, 7, greedy=False)),
        ({"top_p": 1, "min_p": 0.2}, Sampling(1.0, 0, 1.0, 0.2, None, greedy=False)),
        ({"temperature": 2, "top_k": 2, "top_p": 0.5}, Sampling(2.0, 2, 0.5, 0.0, None, greedy=False)),
    ],
)
def test_what_is_not_given_does_not_restrict(arguments: dict[str, Any], expected: Sampling) -> None:
    assert SamplingParams(**arguments).resolved() == expected


@given(
    temperature=st.none() | st.floats(0, 10),
    top_k=st.none() | st.integers(0, 100),
    top_p=st.none() | st.floats(0, 1),
    min_p=st.none() | st.floats(0, 1),
    seed=st.none() | st.integers(0, 2**64 - 1),
)
def test_every_valid_combination_resolves_to_computable_values(
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None, seed: int | None
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    rule = params.resolved()
    assert rule.temperature > 0
    assert 0 < rule.top_p <= 1
    assert rule.seed == seed
    assert rule.greedy == params.greedy == (rule.top_k == 1)


@pytest.mark.parametrize(
    ("arguments", "field", "remedy"),
    [
        ({"max_tokens": 0}, "max_tokens = 0", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens = True", "valid integer"),
        ({"max_tokens": "5"}, "max_tokens = '5'", "valid integer"),
        ({"max_tokens": 2.0}, "max_tokens = 2.0", "valid integer"),
        ({"temperature": -0.1}, "temperature = -0.1", "greater than or equal to 0"),
        ({"temperature": math.nan}, "temperature = nan", "finite number"),
        ({"temperature": math.inf}, "temperature = inf", "finite number"),
        ({"temperature": True}, "temperature = True", "valid number"),
        ({"top_p": 1.01}, "top_p = 1.01", "less than or equal to 1"),
        ({"top_p": -0.5}, "top_p = -0.5", "greater than or equal to 0"),
        ({"top_k": -1}, "top_k = -1", "greater than or equal to 0"),
        ({"min_p": 1.5}, "min_p = 1.5", "less than or equal to 1"),
        ({"seed": -1}, "seed = -1", "greater than or equal to 0"),
        ({"seed": 2**64}, f"seed = {2**64}", f"less than {2**64}"),
        ({"seed": 0.5}, "seed = 0.5", "valid integer"),
        ({"n": 0}, "n = 0", "greater than or equal to 1"),
        ({"n": 3, "best_of": 2, "top_k": 5}, "best_of = 2", "at least n = 3"),
        ({"n": 2, "best_of": 3, "top_k": 5}, "best_of = 3", "leave it out or use n"),
        ({"n": 2}, "n = 2", "use n=1, set temperature, top_k or top_p"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens = 0", "greater than or equal to 1"),
        ({"stop": ""}, "stop = ''", "at least 1 character"),
        ({"stop": ["a", ""]}, "stop = ['a', '']", "item 1 should have at least 1 character"),
        ({"stop": ["a", 3]}, "stop = ['a', 3]", "item 1 should be a valid string"),
        ({"stop": 3}, "stop = 3", "should be a valid string or a valid list"),
        ({"stop": "\ud83e"}, "stop = '\\ud83e'", "valid string"),
        ({"stop": "x", "detokenize": False}, "stop = 'x'", "use stop_token_ids or detokenize=True"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids = [1, -1]", "item 1 should be greater than or equal to 0"),
        ({"stop_token_ids": [True]}, "stop_token_ids = [True]", "valid integer"),
        ({"stop_token_ids": 5}, "stop_token_ids = 5", "valid list"),
        ({"end_id": -2}, "end_id = -2", "greater than or equal to -1"),
        ({"logprobs": -1}, "logprobs = -1", "greater than or equal to 0"),
        ({"logprobs": 1.5}, "logprobs = 1.5", "valid integer"),
        ({"ignore_eos": 1}, "ignore_eos = 1", "valid boolean"),
        ({"length_penalty": math.nan}, "length_penalty = nan", "finite number"),
    ],
)
def test_errors_name_field_value_and_remedy(arguments: dict[str, Any], field: str, remedy: str) -> None:
    text = message(**arguments)
    assert text.startswith(f"SamplingParams.{field} is ")
    assert remedy in text
    assert "\n" not in text


def test_every_wrong_argument_is_reported_at_once() -> None:
    lines = message(max_tokens=0, top_p=2.0, temprature=1.0).splitlines()
    assert [line.split(" is ")[0] for line in lines[:2]] == [
        "SamplingParams.max_tokens = 0",
        "SamplingParams.top_p = 2.0",
    ]
    assert lines[2] == ("SamplingParams got invalid argument: temprature (= 1.0); did you mean temperature?")


def test_an_unknown_field_without_a_similar_name_lists_all() -> None:
    text = message(zzz=1)
    assert "zzz (= 1); it takes add_special_tokens, additional_model_outputs" in text


@pytest.mark.parametrize(
    ("field", "value", "neutral"),
    [
        ("repetition_penalty", 1.1, [None, 1.0, 1]),
        ("presence_penalty", 0.5, [None, 0.0]),
        ("frequency_penalty", -0.5, [None, 0.0]),
        ("min_tokens", 5, [None, 1]),
        ("no_repeat_ngram_size", 3, [None, 1 << 30]),
        ("use_beam_search", True, [False]),
        ("beam_width", 4, [1]),
        ("bad", ["x"], [None]),
        ("prompt_logprobs", 1, [None]),
        ("return_context_logits", True, [False]),
        ("exclude_input_from_output", False, [True]),
        ("guided_decoding", object(), [None]),
        ("logits_processor", len, [None]),
    ],
)
def test_a_later_capability_is_refused_unless_neutral(field: str, value: Any, neutral: list[Any]) -> None:
    text = message(**{field: value})
    assert text.startswith(f"SamplingParams.{field} = ")
    assert "is not available in this release: leave it out or use" in text
    for harmless in neutral:
        assert getattr(SamplingParams(**{field: harmless}), field) == harmless


def test_an_array_is_not_compared_with_the_neutral_value() -> None:
    assert "embedding_bias = array([0., 0.]) is not available" in message(embedding_bias=np.zeros(2))


def test_several_greedy_answers_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLLM_ALLOW_N_GREEDY_DECODING", "1")
    assert SamplingParams(n=2).greedy
    monkeypatch.setenv("TLLM_ALLOW_N_GREEDY_DECODING", "0")
    assert "TLLM_ALLOW_N_GREEDY_DECODING=1" in message(n=2)


@pytest.mark.parametrize(("given", "kept"), [(True, 1), (False, None), (0, 0), (5, 5), (None, None)])
def test_logprobs_true_means_one(given: Any, kept: int | None) -> None:
    assert SamplingParams(logprobs=given).logprobs == kept
    assert not isinstance(SamplingParams(logprobs=given).logprobs, bool)


@pytest.mark.parametrize(
    ("stop", "strings"),
    [(None, ()), ("ab", ("ab",)), ("a", ("a",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ())],
)
def test_stop_strings_are_a_tuple(stop: Any, strings: tuple[str, ...]) -> None:
    assert SamplingParams(stop=stop).stop_strings == strings


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("top_p", 3.0, "SamplingParams.top_p = 3.0 is invalid"),
        ("top_q", 0.5, "SamplingParams got invalid argument: top_q (= 0.5); did you mean top_p"),
        ("repetition_penalty", 2.0, "SamplingParams.repetition_penalty = 2.0 is not available"),
        ("detokenize", False, "SamplingParams.stop = 'x' is invalid with detokenize = False"),
    ],
)
def test_a_refused_assignment_changes_nothing(field: str, value: Any, expected: str) -> None:
    params = SamplingParams(top_p=0.5, stop="x")
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is checked below
        setattr(params, field, value)
    assert str(error.value).startswith(expected)
    assert params == SamplingParams(top_p=0.5, stop="x")


def test_an_assignment_takes_effect() -> None:
    params = SamplingParams()
    params.top_p = 0.5
    params.n = 2
    assert params == SamplingParams(top_p=0.5, n=2)
    assert not params.greedy


def test_copies_are_equal_and_independent() -> None:
    params = SamplingParams(top_p=0.5, stop=["a"])
    for duplicate in (
        params.copy(),
        params.model_copy(deep=True),
        copy.deepcopy(params),
        pickle.loads(pickle.dumps(params)),
    ):
        assert duplicate == params
        duplicate.top_p = 0.25
        duplicate.stop = ["b"]
    assert params == SamplingParams(top_p=0.5, stop=["a"])


def test_an_updated_copy_is_checked() -> None:
    params = SamplingParams(top_p=0.5)
    assert params.model_copy(update={"top_k": 5}) == SamplingParams(top_p=0.5, top_k=5)
    with pytest.raises(ValueError, match=r"SamplingParams\.top_k = -5 is invalid"):
        params.model_copy(update={"top_k": -5})
