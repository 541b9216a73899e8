"""What one step brought, on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from trtllm_jax.engine.request import Embedding, Logits, TokenLogprobs


@dataclass(frozen=True)
class StepOutput:
    """What a step brought, by rows of its plan.

    Attributes:
        tokens: what each row gained.
        logprobs: of each gained token of the rows that ask for them.
        logits: [vocab], of `StepPlan.with_logits`.
        embeddings: [embed], of `StepPlan.with_embeddings`.
        failures: of rows whose changed logits cannot be drawn from, or whose constraint cannot be followed.
    """

    tokens: list[list[int]]
    logprobs: dict[int, Sequence[TokenLogprobs]] = field(default_factory=dict)
    logits: dict[int, Logits] = field(default_factory=dict)
    embeddings: dict[int, Embedding] = field(default_factory=dict)
    failures: dict[int, Exception] = field(default_factory=dict)
