"""What steps report of a sequence besides its tokens, for those that ask for it: one table, from request to result.

A request names what it wants (`Request.reports`), a step returns it by source and row (`StepOutput.by_row`), and an
update carries it by name (`Update.outputs`) to the result.
"""

import enum
from typing import NamedTuple


class Due(enum.Enum):
    """After which of a sequence's tokens something is reported."""

    TOKEN = "token"
    """After each drawn one."""
    PROMPT_TOKEN = "prompt token"
    """After each of the prompt, whether or not it is drawn after."""
    PROMPT = "prompt"
    """After the prompt's last."""


class RowOutput(NamedTuple):
    """One thing that a request may ask for.

    Attributes:
        name: by which it is requested, and carried to the result.
        source: what it is made of, in `StepOutput.by_row`: the result of the programs of that name.
        due: after which tokens.
    """

    name: str
    source: str
    due: Due


ROW_OUTPUTS = (
    RowOutput("logprobs", "logprobs", Due.TOKEN),
    RowOutput("generation_logits", "logits", Due.TOKEN),
    RowOutput("context_logits", "logits", Due.PROMPT_TOKEN),
    RowOutput("embedding", "embeddings", Due.PROMPT),
)

AFTER_STEP = ("logits", "embeddings")
"""Sources that a program of their own makes after a ragged step."""
