"""The choices of a completion: what of its outputs a request wants to see, and in which form."""

from collections.abc import Sequence
from typing import Any

from trtllm_jax.requests.builder import shown_prompt
from trtllm_jax.requests.outputs import CompletionOutput, RequestOutput
from trtllm_jax.serve.http.json_response import as_json
from trtllm_jax.serve.http.tracker import RequestTracker
from trtllm_jax.serve.logprobs import completion_logprobs
from trtllm_jax.serve.protocol.completions import CompletionRequest
from trtllm_jax.serve.token_texts import PositionTracker, answer_positions, prompt_positions
from trtllm_jax.text.inputs import Prompt

_TEXT_CHOICE = b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":null,"stop_reason":null}'


class ChoiceFormatter:
    """Formats the outputs of one request as choices.

    Attributes:
        shows_output: whether generated tokens are part of the answer. With `max_tokens` 0 and `echo`, as programs that
            score texts ask, one token is generated and only the prompt shown.
    """

    def __init__(self, tracker: RequestTracker, body: CompletionRequest) -> None:
        self._tracker = tracker
        self._body = body
        self.shows_output = body.max_tokens != 0
        self._is_text_only = body.logprobs is None and body.detokenize and not body.echo
        self._started: set[int] = set()
        self._positions: dict[int, PositionTracker] = {}

    def whole(self, output: RequestOutput, one: CompletionOutput, index: int) -> dict[str, Any]:
        """The choice of a complete answer, after the prompt where that is echoed."""
        return self._choice(output, one, index, from_start=True)

    def delta(self, output: RequestOutput, one: CompletionOutput, index: int) -> bytes | None:
        """A stream's next choice as JSON, None where the last step added nothing to show."""
        finish = None if one.finish_reason == "cancelled" else one.finish_reason
        if self._is_text_only and not finish:
            text = one.text_diff
            if not text:
                return None
            self._started.add(index)
            return _TEXT_CHOICE % (index, as_json(text))
        if not one.token_ids_diff and not finish:
            return None
        return as_json(self._choice(output, one, index, from_start=index not in self._started))

    def _choice(self, output: RequestOutput, one: CompletionOutput, index: int, *, from_start: bool) -> dict[str, Any]:
        self._started.add(index)
        text, tokens = (one.text, one.token_ids) if from_start else (one.text_diff, one.token_ids_diff)
        finish = one.finish_reason
        if not self.shows_output:
            text, tokens = (self._prompt_text(output), output.prompt_token_ids) if from_start else ("", [])
            finish = finish and "length"
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        choice["stop_reason"] = one.stop_reason if self.shows_output else None
        if self._body.logprobs is not None:
            choice["logprobs"] = self._logprobs(output, one, index, tokens, from_start=from_start)
        if not self._body.detokenize:
            choice["token_ids"] = list(tokens)
        return choice

    def _logprobs(
        self, output: RequestOutput, one: CompletionOutput, index: int, tokens: Sequence[int], *, from_start: bool
    ) -> dict[str, Any]:
        """Those of `tokens` and of the token that ended the answer, which belongs to the sum of what was drawn."""
        body, texts = self._body, self._tracker.server.texts
        tokens, positions, logprobs = list(tokens), [], []
        if from_start:
            prompt: Sequence[int] = ()
            text = ""
            if body.echo:
                prompt, text = output.prompt_token_ids, self._prompt_text(output)
                positions = prompt_positions(texts, text, prompt, body.skip_special_tokens, body.add_special_tokens)
                logprobs = [{}, *one.prompt_logprobs[:-1]]
            self._positions[index] = answer_positions(texts, prompt, len(text), body.skip_special_tokens)
        if self.shows_output:
            logprobs += one.logprobs if from_start else one.logprobs_diff
            if one.finish_reason and one.end_logprobs is not None:
                end_token, candidates = one.end_logprobs
                tokens.append(end_token)
                logprobs.append(candidates)
        positions += map(self._positions[index].add, tokens[len(positions) :])
        if not body.detokenize:
            positions = [position._replace(offset=0) for position in positions]
        return completion_logprobs(texts, tokens, positions, logprobs, body.logprobs or 0)

    def _prompt_text(self, output: RequestOutput) -> str:
        params = self._tracker.params
        assert params is not None
        return shown_prompt(Prompt(output.prompt, output.prompt_token_ids), params, self._tracker.server.llm.tokenizer)
