"""What config.json says of a sequence classifier's classes: their names, and what makes probabilities of logits."""

from collections.abc import Mapping
from typing import Any

from checkpoints.sentence_transformers import stated_activation


def class_names(config: Mapping[str, Any], labels: int) -> tuple[str, ...]:
    """The name of each class as `id2label` has it, else LABEL_ and its index."""
    stated = config.get("id2label")
    named = stated if isinstance(stated, Mapping) else {}
    return tuple(str(named.get(str(index), f"LABEL_{index}")) for index in range(labels))


def class_activation(config: Mapping[str, Any], labels: int) -> str:
    """What makes probabilities of logits: "softmax", "sigmoid" or "identity".

    `problem_type` decides, else what sentence-transformers wrote, else it is a softmax, or a sigmoid of one class.
    """
    usual = "sigmoid" if labels == 1 else "softmax"
    of_problems = {
        "regression": "identity",
        "single_label_classification": usual,
        "multi_label_classification": "sigmoid",
    }
    return of_problems.get(str(config.get("problem_type"))) or stated_activation(config) or usual
