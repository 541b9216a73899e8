"""One sequence on its way through the engine: what was asked, how far it got, which pages it holds.

Plain Python: this module, the block pool and the scheduler know no jax.
"""

import enum
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trtllm_jax.engine.blocks import Blocks
from trtllm_jax.engine.grammar import GrammarMatcher
from trtllm_jax.engine.logit_edits import LogitEdits
from trtllm_jax.engine.occurrences import Occurrences
from trtllm_jax.engine.prefix import MediaSpan
from trtllm_jax.engine.row_outputs import ROW_OUTPUTS, RowOutput
from trtllm_jax.engine.sampling import Sampling

Logits = npt.NDArray[np.float32]
Embedding = npt.NDArray[np.float32]

MAX_EDITS = 1 << 14
"""Logits that the device changes for one sequence's next token at most."""

MAX_LOGPROBS = 20
"""Most alternatives a position that log-probabilities are computed for."""

MAX_DEVICE_STOPS = 8
"""Stop ids that the device looks for itself; further ones end a sequence on the host, a dispatch later."""

MAX_BIASED = 512
"""Ids of one sequence with a bias or a ban that the device remembers."""

MAX_NGRAM = 16
"""The longest n-gram whose repetition the device finds itself."""


class FinishReason(enum.StrEnum):
    """Why a sequence ended; the values are what users see."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one generated position: the token's own with its rank (1 is best), and the best ones."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class Admission(NamedTuple):
    """How a sequence began: prompt tokens that the prefix cache had, and seconds until it was admitted first."""

    cached_tokens: int
    waited: float


class Update(NamedTuple):
    """The result of one engine step for one sequence: new tokens, and its end or its failure.

    Attributes:
        request: the sequence.
        tokens: newly generated ids, the stop token included if that ended the sequence.
        finish: why the sequence ended, None while it runs.
        error: the failure that ended it, if one did.
        admission: how the sequence began, with its first tokens.
        outputs: what else it requested, by the names of `ROW_OUTPUTS`, with an entry for each token it is due after.
    """

    request: "Request"
    tokens: Sequence[int] = ()
    finish: FinishReason | None = None
    error: BaseException | None = None
    admission: Admission | None = None
    outputs: Mapping[str, Sequence[Any]] = {}


@dataclass(eq=False)
class Request:
    """One sequence: what was asked first, which never changes, then what the scheduler keeps about it.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: new tokens at most; prompt and they fit the engine's sequence length.
        sampling: how to draw; its seed is resolved to a number already.
        stop_ids: ids that end the sequence.
        num_logprobs: alternatives to report a position, None for no log-probabilities.
        salt: the hash of what the user gave to keep prefixes apart; empty for none.
        adapter: the LoRA adapter's name, which its keys and values depend on; None for none.
        media: positions of the prompt that stand for images and the like.
        parent: the first of n samples of one prompt; the others fork its pages instead of computing them again.
        owner: an object of whoever submitted it; the engine passes it back unread.
        edits: changes to its logits before a draw, None for none.
        matcher: keeps it to the constraint of its edits, None where they have none.
        reports: names of `ROW_OUTPUTS` that its updates carry; log-probabilities are requested by `num_logprobs`.
        id: the owner's number, which is passed to users' logits processors.
        token_types: the segment of each of the prompt's tokens where it is a pair of texts; empty where it is one.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    salt: bytes = b""
    parent: "Request | None" = None
    owner: Any = None
    edits: LogitEdits | None = None
    matcher: GrammarMatcher | None = None
    reports: frozenset[str] = frozenset()
    id: int = 0
    adapter: str | None = None
    media: Sequence[MediaSpan] = ()
    token_types: Sequence[int] = ()

    generated: list[int] = field(default_factory=list)
    occurrences: Occurrences = field(default_factory=Occurrences)
    """Of its tokens, as far as its penalties asked."""
    slot: int | None = None
    """Row of the device's state while the sequence is scheduled; None while it waits."""
    blocks: Blocks | None = None
    """What it holds of the KV cache while it is scheduled."""
    hashes: list[bytes] = field(default_factory=list)
    """Chain hashes of the full blocks of known tokens, as far as they were needed."""
    computed_min: int = 0
    """Tokens whose keys and values the dispatched steps will have written at least, if nothing ends the sequence."""
    computed_max: int = 0
    """The same at most: while a prompt is computed, and once no step is in flight, both are equal."""
    prefill_end: int = 0
    """Tokens to compute before the first draw: the prompt, or after a preemption everything known at that time."""
    dispatched: int = 0
    """`computed_min` at the last dispatch: what a page copy in the next dispatch finds written."""
    in_flight: int = 0
    """Dispatched steps that hold this sequence and are not committed yet."""
    submitted: float = field(default_factory=time.perf_counter)
    """When it came, in `time.perf_counter`'s seconds."""
    cached_tokens: int | None = None
    """Prompt tokens that the prefix cache had when the sequence was first admitted; None before."""
    waited: float = 0.0
    """Seconds until then."""
    context_sent: int = 0
    """Positions of the prompt whose logits were reported."""
    finished: FinishReason | None = None

    @cached_property
    def needs_host_token(self) -> bool:
        """Whether the host must know a token before the next can be drawn: one step is in flight at most."""
        if self._keeps_logits or self.sampling.decay is not None:
            return True
        return self.edits is not None and not _on_device(self.edits)

    @cached_property
    def penalised(self) -> bool:
        """Whether the device changes its logits by what it knows of the sequence."""
        return self.edits is not None and not self.needs_host_token

    @cached_property
    def has_extras(self) -> bool:
        """Whether steps do more for it than draw a token: report log-probabilities, or change its logits first."""
        return not self.needs_host_token and (self.penalised or self.num_logprobs is not None)

    @cached_property
    def row_outputs(self) -> tuple[RowOutput, ...]:
        """What its updates carry besides tokens."""
        wanted = self.reports if self.num_logprobs is None else {*self.reports, "logprobs"}
        return tuple(output for output in ROW_OUTPUTS if output.name in wanted)

    @property
    def _keeps_logits(self) -> bool:
        return "generation_logits" in self.reports

    @property
    def host_drawn(self) -> bool:
        """Whether the host must see its next logits: users' functions change them, they are kept, or many change."""
        if self._keeps_logits:
            return True
        edits = self.edits
        return edits is not None and (
            edits.batched or bool(edits.processors) or edits.most_entries(self.total) > MAX_EDITS
        )

    @property
    def top_p(self) -> float:
        """The nucleus that its next token is drawn from, as far as its tokens are known."""
        start, decay = self.sampling.top_p, self.sampling.decay
        return start if decay is None else decay.top_p(start, self.generated)

    @property
    def reports_context(self) -> bool:
        """Whether logits of its prompt are still to be reported."""
        return "context_logits" in self.reports and self.context_sent < len(self.prompt)

    @property
    def total(self) -> int:
        """Tokens known to the host."""
        return len(self.prompt) + len(self.generated)

    @cached_property
    def limit(self) -> int:
        """Tokens the sequence can reach."""
        return len(self.prompt) + self.max_tokens

    @property
    def prefilling(self) -> bool:
        """Whether known tokens are left to compute before one can be drawn."""
        return self.computed_max < self.prefill_end

    @property
    def exhausted(self) -> bool:
        """Whether the dispatched steps reach the token limit, so that only their commit is left."""
        return self.computed_min >= self.limit - 1 and not self.prefilling

    def tokens(self, first: int, last: int) -> list[int]:
        """Known token ids from position `first` up to but not including `last`."""
        split = len(self.prompt)
        return [*self.prompt[first:last], *self.generated[max(first - split, 0) : max(last - split, 0)]]


def _on_device(edits: LogitEdits) -> bool:
    """Whether changes depend on nothing but the sequence's tokens, within the device's bounds."""
    if edits.processors or edits.batched or edits.constraint is not None:
        return False
    return (
        all(len(ids) == 1 for ids in edits.bad)
        and edits.biased.size + len(edits.bad) <= MAX_BIASED
        and edits.no_repeat_ngram <= MAX_NGRAM
        and (not edits.min_tokens or len(edits.ends) <= MAX_DEVICE_STOPS)
    )
