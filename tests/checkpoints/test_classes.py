from __future__ import annotations

from typing import Any

import pytest

from checkpoints.classes import class_activation, class_names

IDENTITY = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"id2label": {"1": "no", "0": "yes"}}, ("yes", "no")),
        ({"id2label": {"1": "no"}}, ("LABEL_0", "no")),
        ({}, ("LABEL_0", "LABEL_1")),
        ({"id2label": ["yes", "no"]}, ("LABEL_0", "LABEL_1")),
    ],
)
def test_names_are_those_of_id2label_or_numbered(config: dict[str, Any], names: tuple[str, ...]) -> None:
    assert class_names(config, 2) == names


@pytest.mark.parametrize(
    ("config", "labels", "activation"),
    [
        ({}, 3, "softmax"),
        ({}, 1, "sigmoid"),
        (IDENTITY, 3, "identity"),
        ({"problem_type": None}, 3, "softmax"),
        ({"problem_type": ["regression"]}, 3, "softmax"),
        ({"problem_type": "regression"}, 1, "identity"),
        ({"problem_type": "multi_label_classification"} | IDENTITY, 3, "sigmoid"),
        ({"problem_type": "single_label_classification"} | IDENTITY, 3, "softmax"),
        ({"problem_type": "single_label_classification"} | IDENTITY, 1, "sigmoid"),
    ],
)
def test_a_problem_type_goes_before_what_a_library_wrote(config: dict[str, Any], labels: int, activation: str) -> None:
    assert class_activation(config, labels) == activation
