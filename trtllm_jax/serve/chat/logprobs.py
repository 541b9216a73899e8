"""The log-probabilities of a chat's answers."""

from collections.abc import Sequence
from typing import Any

from trtllm_jax.serve.http.tracker import RequestTracker
from trtllm_jax.serve.logprobs import LogprobsByPosition, chat_logprobs
from trtllm_jax.serve.protocol.chat import ChatRequest
from trtllm_jax.serve.token_texts import PositionTracker


class ChatLogprobs:
    """The log-probabilities of one answer's tokens, in the order in which they are generated."""

    def __init__(self, tracker: RequestTracker, body: ChatRequest) -> None:
        assert tracker.params is not None
        self._texts = tracker.server.texts
        self._top_count = (body.top_logprobs or 0) if body.logprobs else None
        self._positions = PositionTracker(self._texts, tracker.params.skip_special_tokens)

    def of(self, tokens: Sequence[int], logprobs: LogprobsByPosition) -> dict[str, Any] | None:
        """Those of the next tokens, None where the request asks for none."""
        if self._top_count is None:
            return None
        positions = list(map(self._positions.add, tokens))
        return chat_logprobs(self._texts, tokens, positions, logprobs, self._top_count)
