"""The results of one step, on the host."""

from dataclasses import dataclass, field
from typing import Any

ByRow = dict[int, Any]


@dataclass(frozen=True)
class StepOutput:
    """The results of a step, by rows of its plan.

    Attributes:
        tokens: what each row gained.
        by_row: by the sources of `ROW_OUTPUTS`, for the rows that they are of: "logprobs" a list with an entry for
            each gained token, the others an array.
        failures: of rows whose edited logits cannot be drawn from, or whose constraint cannot be followed.
    """

    tokens: list[list[int]]
    by_row: dict[str, ByRow] = field(default_factory=lambda: {"logprobs": {}, "logits": {}, "embeddings": {}})
    failures: dict[int, Exception] = field(default_factory=dict)
