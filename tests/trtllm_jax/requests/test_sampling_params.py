"""TensorRT-LLM's defaults and greedy rule, and an error with field, value and remedy for everything that is wrong."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_jax import sampling_params
from trtllm_jax.engine.logit_edits import LogitEdits
from trtllm_jax.engine.sampling import NucleusDecay, Sampling
from trtllm_jax.requests.logits_processors import BatchedLogitsProcessor, LogitsProcessor
from trtllm_jax.requests.sampling_params import SamplingParams

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
        ({"best_of": 3}, "best_of = 3", "use best_of=1, set temperature, top_k or top_p"),
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
        ({"repetition_penalty": 0}, "repetition_penalty = 0", "greater than 0"),
        ({"repetition_penalty": -1.5}, "repetition_penalty = -1.5", "greater than 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty = nan", "finite number"),
        ({"repetition_penalty": True}, "repetition_penalty = True", "valid number"),
        ({"repetition_penalty": "1.1"}, "repetition_penalty = '1.1'", "valid number"),
        ({"presence_penalty": math.inf}, "presence_penalty = inf", "finite number"),
        ({"presence_penalty": [1.0]}, "presence_penalty = [1.0]", "valid number"),
        ({"frequency_penalty": False}, "frequency_penalty = False", "valid number"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty = -inf", "finite number"),
        ({"prompt_ignore_length": -1}, "prompt_ignore_length = -1", "greater than or equal to 0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size = -1", "greater than or equal to 0"),
        ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size = 2.5", "valid integer"),
        ({"min_tokens": -1}, "min_tokens = -1", "greater than or equal to 0"),
        ({"min_tokens": True}, "min_tokens = True", "valid integer"),
        ({"min_tokens": 33}, "min_tokens = 33", "at most max_tokens = 32"),
        ({"bad": ""}, "bad = ''", "at least 1 character"),
        ({"bad": ["a", 3]}, "bad = ['a', 3]", "item 1 should be a valid string"),
        ({"bad_token_ids": [-1]}, "bad_token_ids = [-1]", "item 0 should be greater than or equal to 0"),
        ({"bad_token_ids": 7}, "bad_token_ids = 7", "valid list"),
        ({"top_p": 0.9, "top_p_decay": 0.0}, "top_p_decay = 0.0", "greater than 0"),
        ({"top_p": 0.9, "top_p_decay": 1.5}, "top_p_decay = 1.5", "less than or equal to 1"),
        ({"top_p": 0.9, "top_p_min": 0.0}, "top_p_min = 0.0", "greater than 0"),
        ({"top_p": 0.9, "top_p_reset_ids": -1}, "top_p_reset_ids = -1", "greater than or equal to 0"),
        ({"top_p_decay": 0.5}, "top_p_decay = 0.5", "set temperature or top_p, or leave it out"),
        ({"prompt_logprobs": -1}, "prompt_logprobs = -1", "greater than or equal to 0"),
        ({"return_context_logits": 1}, "return_context_logits = 1", "valid boolean"),
        ({"exclude_input_from_output": "no"}, "exclude_input_from_output = 'no'", "valid boolean"),
        ({"embedding_bias": 3.0}, "embedding_bias = 3.0", "one number for each id"),
        ({"embedding_bias": "abc"}, "embedding_bias = 'abc'", "one number for each id"),
        ({"embedding_bias": []}, "embedding_bias = []", "at least one of them finite"),
        ({"embedding_bias": [[0.0, 1.0]]}, "embedding_bias = [[0.0, 1.0]]", "one number for each id"),
        ({"embedding_bias": [0.0, math.nan]}, "embedding_bias = [0.0, nan]", "finite or -inf"),
        ({"embedding_bias": [0.0, math.inf]}, "embedding_bias = [0.0, inf]", "finite or -inf"),
        ({"embedding_bias": [0.0, 1e300]}, "embedding_bias = [0.0, 1e+300]", "finite or -inf"),
        ({"embedding_bias": [-math.inf]}, "embedding_bias = [-inf]", "at least one of them finite"),
        ({"logits_processor": 5}, "logits_processor = 5", "give a function"),
        ({"logits_processor": [5, None]}, "logits_processor = [5, None]", "give a function"),
        ({"logits_processor": "print"}, "logits_processor = 'print'", "give a function"),
        ({"logits_processor": dict}, "logits_processor = <class 'dict'>", "an object of a subclass"),
        ({"apply_batched_logits_processor": 1}, "apply_batched_logits_processor = 1", "valid boolean"),
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
        ("use_beam_search", True, [False]),
        ("beam_width", 4, [1]),
        ("beam_search_diversity_rate", 0.5, [None, 0.0]),
        ("early_stopping", 1, [None]),
        ("beam_width_array", [2, 3], [None]),
        ("return_perf_metrics", True, [False]),
        ("return_encoder_output", True, [False]),
        ("additional_model_outputs", ["x"], [None]),
        ("thinking_token_budget", 5, [None]),
        ("lookahead_config", {}, [None]),
    ],
)
def test_a_later_capability_is_refused_unless_neutral(field: str, value: Any, neutral: list[Any]) -> None:
    text = message(**{field: value})
    assert text.startswith(f"SamplingParams.{field} = ")
    assert "is not available in this release: leave it out or use" in text
    for harmless in neutral:
        assert getattr(SamplingParams(**{field: harmless}), field) == harmless


def test_an_array_is_not_compared_with_the_neutral_value() -> None:
    assert "lookahead_config = array([0., 0.]) is not available" in message(lookahead_config=np.zeros(2))


NOTHING_TO_EDIT: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "prompt_ignore_length": 4},
    {"min_tokens": 0, "no_repeat_ngram_size": 1 << 30, "bad": [], "bad_token_ids": [], "logits_processor": []},
    {"no_repeat_ngram_size": 0, "bad": None, "embedding_bias": None, "top_p": 0.9, "top_p_decay": 0.5},
]


@pytest.mark.parametrize("arguments", NOTHING_TO_EDIT)
def test_what_changes_no_logits_leaves_the_draw_to_the_device(arguments: dict[str, Any]) -> None:
    assert SamplingParams(**arguments).edits(frozenset({3}), ()) is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"repetition_penalty": 1.5}, {"repetition": 1.5}),
        ({"presence_penalty": -2.0}, {"presence": -2.0}),
        ({"frequency_penalty": 0.5, "prompt_ignore_length": 4}, {"frequency": 0.5, "ignored_prompt": 4}),
        ({"min_tokens": 2}, {"min_tokens": 2}),
        ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram": 3}),
        ({"bad_token_ids": [4, 5]}, {"bad": ((8, 9), (4,), (5,))}),
        ({"logits_processor": print}, {"processors": (print,)}),
        ({"logits_processor": [print, max]}, {"processors": (print, max)}),
        ({"apply_batched_logits_processor": True}, {"batched": True}),
    ],
)
def test_what_changes_logits_goes_to_the_engine(arguments: dict[str, Any], expected: dict[str, Any]) -> None:
    bad = ((8, 9),) if "bad_token_ids" in arguments else ()
    edits = SamplingParams(**arguments).edits(frozenset({3}), bad)
    assert vars(edits) == vars(LogitEdits(ends=frozenset({3}), **expected))


@pytest.mark.parametrize("dtype", [list, np.float64, np.float32])
def test_a_bias_of_any_numbers_becomes_float32(dtype: Any) -> None:
    given = [0.0, -math.inf, 2.5] if dtype is list else np.array([0.0, -math.inf, 2.5], dtype)
    edits = SamplingParams(embedding_bias=given).edits(frozenset(), ())
    assert edits is not None
    assert edits.bias is not None
    assert edits.bias.dtype == np.float32
    assert edits.bias.tolist() == [0.0, -math.inf, 2.5]


@pytest.mark.parametrize(
    ("arguments", "decay"),
    [
        ({"top_p": 0.9}, None),
        ({"top_p": 0.9, "top_p_decay": 1.0, "top_p_min": 0.1, "top_p_reset_ids": 5}, None),
        ({"top_p": 0.9, "top_p_decay": 0.5}, NucleusDecay(0.5, 1e-6, 1)),
        ({"top_k": 9, "top_p_decay": 0.5, "top_p_min": 0.25, "top_p_reset_ids": 0}, NucleusDecay(0.5, 0.25, 0)),
    ],
)
def test_a_falling_top_p_has_tensorrt_llms_defaults(arguments: dict[str, Any], decay: NucleusDecay | None) -> None:
    assert SamplingParams(**arguments).resolved().decay == decay


@pytest.mark.parametrize(("arguments", "sequences"), [({}, 1), ({"n": 3}, 3), ({"n": 2, "best_of": 5}, 5)])
def test_as_many_sequences_run_as_the_best_are_chosen_of(arguments: dict[str, Any], sequences: int) -> None:
    assert SamplingParams(top_k=5, **arguments).sequences == sequences


def test_processors_classes_have_tensorrt_llms_import_path() -> None:
    found = sampling_params.LogitsProcessor, sampling_params.BatchedLogitsProcessor
    assert found == (LogitsProcessor, BatchedLogitsProcessor)
    assert sampling_params.SamplingParams is SamplingParams


def test_several_greedy_answers_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLLM_ALLOW_N_GREEDY_DECODING", "1")
    assert SamplingParams(n=2).greedy
    monkeypatch.setenv("TLLM_ALLOW_N_GREEDY_DECODING", "0")
    assert "TLLM_ALLOW_N_GREEDY_DECODING=1" in message(n=2)


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize(("given", "kept"), [(True, 1), (False, None), (0, 0), (5, 5), (None, None)])
def test_logprobs_true_means_one(field: str, given: Any, kept: int | None) -> None:
    value = getattr(SamplingParams(**{field: given}), field)
    assert value == kept
    assert not isinstance(value, bool)


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
        ("beam_width", 2, "SamplingParams.beam_width = 2 is not available"),
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
