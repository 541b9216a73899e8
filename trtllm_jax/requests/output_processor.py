"""From token ids to results: one thread detokenises the engine's updates and wakes whoever waits for a result."""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from trtllm_jax.common.errors import detached
from trtllm_jax.engine.logit_edits import top_logprobs
from trtllm_jax.engine.request import FinishReason, Logits, Request, TokenLogprobs, Update
from trtllm_jax.logger import logger
from trtllm_jax.requests.outputs import Delta, Logprob, RequestOutput
from trtllm_jax.requests.sampling_params import SamplingParams
from trtllm_jax.text.detokenizer import IncrementalDetokenizer

_LISTS = ("token_ids", "logprobs")


class OutputProcessor:
    """Turns one sequence's updates into text, finds stop strings, and delivers to the sequence's result.

    Args:
        output: the result to deliver to.
        index: which of its n sequences this is.
        params: the request's sampling parameters.
        detokenizer: None if the request does not detokenise.
        interval: steps between two deliveries; None to deliver only at the end.
        stop: called when the text contains a stop string, so that the engine ends the sequence.
        prompt_logprobs: the prompt's, shared by all its samples.
    """

    def __init__(
        self,
        output: RequestOutput,
        index: int,
        params: SamplingParams,
        detokenizer: IncrementalDetokenizer | None,
        interval: int | None,
        stop: Callable[[Request], None],
        prompt_logprobs: "PromptLogprobs",
    ) -> None:
        self._output = output
        self._index = index
        self.params = params
        self._detokenizer = detokenizer
        self._interval = interval
        self._stop = stop
        self._user_stops = frozenset(params.stop_token_ids or ())
        self._tokens = 0
        self._steps = 0
        self._ended = False
        self._prompt_logprobs = prompt_logprobs
        self._prompt_reported = False
        self._wants_outputs = (
            params.return_generation_logits or params.return_context_logits or params.prompt_logprobs is not None
        )
        self._pending: _PendingDelta | None = None

    def take(self, update: Update) -> None:
        """Process one step's update, and deliver if a delivery is due."""
        if self._ended:
            return
        if update.error is not None:
            self._ended = True
            self._output._deliver(Delta(self._index, error=update.error))
            # The result has failed, so the prompt's other samples need not go on.
            self._output._abort()
            return
        if update.admission is not None:
            self._output._note_start(update.admission)
        delta = self._delta(update)
        self._steps += 1
        if delta.finish_reason is not None:
            self._ended = True
            self._output._note_end()
        due = self._ended or (self._interval is not None and self._steps % self._interval == 0)
        if due and self._pending is None:
            self._output._deliver(delta)
            return
        self._pending = _PendingDelta() if self._pending is None else self._pending
        self._pending.add(delta)
        if due:
            self._output._deliver(self._pending.joined(delta))
            self._pending = None

    def _delta(self, update: Update) -> Delta:
        """A step's update in the form of results: with text, and without tokens at or after a stop."""
        if "embedding" in update.outputs:
            # A generating engine draws a token after every prompt; an embedding request drops it.
            return Delta(self._index, finish_reason=FinishReason.STOP.value, outputs=update.outputs)
        tokens, finish = update.tokens, update.finish
        logprobs: Sequence[TokenLogprobs] = update.outputs.get("logprobs", ())
        stop_reason: int | str | None = None
        end: tuple[int, dict[int, Logprob]] | None = None
        if finish is FinishReason.STOP and tokens:
            stop_reason = tokens[-1] if tokens[-1] in self._user_stops else None
            if not self.params.include_stop_str_in_output:
                if logprobs:
                    end = tokens[-1], _readable(logprobs[-1])
                tokens = tokens[:-1]
        text = ""
        if self._detokenizer is not None:
            text = self._detokenizer.append(tokens)
            if finish is not None:
                text += self._detokenizer.finish()
            if self._detokenizer.stopped is not None:
                # A stop string may be found only after tokens that follow it were delivered.
                kept = max((self._detokenizer.num_tokens_at_stop or 0) - self._tokens, 0)
                tokens, stop_reason, end = tokens[:kept], self._detokenizer.stopped, None
                if finish is None:
                    self._stop(update.request)
                finish = FinishReason.STOP
        self._tokens += len(tokens)
        details = [_readable(entry) for entry in logprobs[: len(tokens)]] if logprobs else ()
        delta = Delta(self._index, text, tokens, details, finish.value if finish else None, stop_reason, end=end)
        return delta._replace(outputs=self._outputs(update, len(tokens))) if self._wants_outputs else delta

    def _outputs(self, update: Update, tokens: int) -> dict[str, Sequence[Any]]:
        """The optional outputs: logits of the generated tokens, and logits and log-probabilities of the prompt."""
        found: dict[str, Sequence[Any]] = {}
        if self.params.return_generation_logits:
            found["generation_logits"] = update.outputs.get("generation_logits", ())[:tokens]
        if self.params.return_context_logits:
            found["context_logits"] = update.outputs.get("context_logits", ())
        if self.params.prompt_logprobs is not None:
            found["prompt_logprobs"] = list(map(_readable, self._prompt_entries(update)))
        return found

    def _prompt_entries(self, update: Update) -> Sequence[TokenLogprobs]:
        """The prompt's log-probabilities to report: a first sample's as they come, others' with their first token."""
        shared = self._prompt_logprobs
        if self._index == 0:
            entries = update.outputs.get("prompt_logprobs") or shared.take(update)
            shared.reported += entries
            return entries
        if self._prompt_reported or not update.tokens:
            return ()
        self._prompt_reported = True
        last = update.outputs.get("prompt_logprobs") or shared.last(update.tokens[0])
        return [*shared.reported[:-1], *last]


class _PendingDelta:
    """Deltas that are not delivered yet, merged into lists: keeping one object for each token would be slow."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._lists: dict[str, list[Any]] = {name: [] for name in _LISTS}
        self._outputs: dict[str, list[Any]] = {}

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        for name, found in self._lists.items():
            found += getattr(delta, name)
        for name, entries in delta.outputs.items():
            self._outputs.setdefault(name, []).extend(entries)

    def joined(self, last: Delta) -> Delta:
        """The merged delta, with the finish reason of the `last` one."""
        every: dict[str, Any] = {"text": "".join(self._texts), "outputs": self._outputs, **self._lists}
        return last._replace(**every)


class PromptLogprobs:
    """Log-probabilities of a prompt, shared by its samples: one entry for each prompt token.

    As in TensorRT-LLM, entry i has the `count` likeliest tokens after token i, and token i + 1. The last entry has the
    first generated token of a sample in place of token i + 1.

    Attributes:
        reported: the entries that the first sample, which computes the prompt, has reported so far.
    """

    def __init__(self, prompt: Sequence[int], count: int | None) -> None:
        self._prompt = prompt
        self._count = count or 0
        self._seen = 0
        self._logits: Logits | None = None
        self.reported: list[TokenLogprobs] = []

    def take(self, update: Update) -> list[TokenLogprobs]:
        """The entries of the prompt logits in an update of the first sample."""
        entries = []
        for logits in update.outputs.get("context_logits", ()):
            self._seen += 1
            if self._seen < len(self._prompt):
                entries.append(self._entry(logits, self._prompt[self._seen]))
            else:
                self._logits = logits
                entries += self.last(update.tokens[0])
        return entries

    def last(self, token: int) -> list[TokenLogprobs]:
        """The last entry, for a sample that begins with `token`; none if the first sample ended before computing it."""
        return [] if self._logits is None else [self._entry(self._logits, token)]

    def _entry(self, logits: Logits, token: int) -> TokenLogprobs:
        top, own, rank = top_logprobs(logits, self._count, token)
        return TokenLogprobs(token, own, rank, tuple(top))


def _readable(entry: TokenLogprobs) -> dict[int, Logprob]:
    """Log-probabilities by token id: the likeliest first, then the drawn token if it is not among them."""
    best = {token: Logprob(logprob, rank) for rank, (token, logprob) in enumerate(entry.top, start=1)}
    return best | {entry.token: Logprob(entry.logprob, entry.rank)}


class OutputThread:
    """A thread that takes the engine's updates to their owners, each an `OutputProcessor`."""

    def __init__(self) -> None:
        self._updates: queue.SimpleQueue[Sequence[Update] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="trtllm_jax-postprocess", daemon=True)
        self._thread.start()

    def put(self, updates: Sequence[Update]) -> None:
        """Queue one step's updates; never blocks."""
        self._updates.put(updates)

    def end(self) -> None:
        """End the thread once it has delivered what is queued; nothing may be queued afterwards."""
        self._updates.put(None)

    def join(self) -> None:
        """Wait until the thread has ended, which needs a call of `end`; returns at once in the thread itself."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while (updates := self._updates.get()) is not None:
            deliver(updates)
            del updates  # so that the waiting thread keeps no finished request alive


def deliver(updates: Iterable[Update]) -> None:
    """Pass each update to its owner. An exception fails the sequence that it concerns and no other."""
    for update in updates:
        try:
            update.request.owner.take(update)
        except Exception as failure:
            try:
                update.request.owner.take(Update(update.request, error=detached(failure)))
            except Exception:
                logger.exception("the failure of a request could not be delivered to its result")
