"""What makes scores and probabilities of a classifier's logits."""

from collections.abc import Callable
from typing import Any

import numpy as np

Logits = np.ndarray[Any, np.dtype[np.floating[Any]]]


def _identity(logits: Logits) -> Logits:
    return logits


def _sigmoid(logits: Logits) -> Logits:
    # By the hyperbolic tangent, which does not overflow.
    return 0.5 * (1 + np.tanh(0.5 * logits))


def _softmax(logits: Logits) -> Logits:
    powers: Logits = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


ACTIVATIONS: dict[str, Callable[[Logits], Logits]] = {
    "identity": _identity,
    "sigmoid": _sigmoid,
    "softmax": _softmax,
}
"""Each by its name; a softmax is that of the last axis."""
