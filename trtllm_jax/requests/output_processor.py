"""From token ids to what users read: one thread turns the engine's updates into text and wakes the waiters."""

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
    """One sequence's way out: detokenising, stop strings, and when its owner is told.

    Args:
        output: the owner's result.
        index: which of its n sequences.
        params: what was asked for.
        detokenizer: None where no text is wanted.
        interval: steps between two deliveries, None to deliver only at the end.
        stop: called when the text hit a stop string, so that the engine ends the sequence.
        prompt_logprobs: of the prompt, which all its sequences share.
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
        self._waiting: _Waiting | None = None

    def take(self, update: Update) -> None:
        """Add one step's update, and deliver what is due."""
        if self._ended:
            return
        if update.error is not None:
            self._ended = True
            self._output._deliver(Delta(self._index, error=update.error))
            # The other samples of its prompt have nobody left to tell.
            self._output._abort()
            return
        if update.tokens and not self._tokens:
            self._output._note_start(update.admission)
        gained = self._gain(update)
        self._steps += 1
        if gained.finish_reason is not None:
            self._ended = True
            self._output._note_end()
        due = self._ended or (self._interval is not None and self._steps % self._interval == 0)
        if due and self._waiting is None:
            self._output._deliver(gained)
            return
        self._waiting = _Waiting() if self._waiting is None else self._waiting
        self._waiting.add(gained)
        if due:
            self._output._deliver(self._waiting.joined(gained))
            self._waiting = None

    def _gain(self, update: Update) -> Delta:
        """What a step brought, as its owner sees it."""
        if "embedding" in update.outputs:
            # The engine draws a token after every prompt; nobody asked for this one.
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
                # A stop string may be recognised only after tokens that follow it were delivered.
                kept = max((self._detokenizer.num_tokens_at_stop or 0) - self._tokens, 0)
                tokens, stop_reason, end = tokens[:kept], self._detokenizer.stopped, None
                if finish is None:
                    self._stop(update.request)
                finish = FinishReason.STOP
        self._tokens += len(tokens)
        details = [_readable(entry) for entry in logprobs[: len(tokens)]] if logprobs else ()
        gained = Delta(self._index, text, tokens, details, finish.value if finish else None, stop_reason, end=end)
        return gained._replace(outputs=self._outputs(update, len(tokens))) if self._wants_outputs else gained

    def _outputs(self, update: Update, tokens: int) -> dict[str, Sequence[Any]]:
        """What few ask for: the logits of the tokens, and what the model said after the prompt's next ones."""
        found: dict[str, Sequence[Any]] = {}
        if self.params.return_generation_logits:
            found["generation_logits"] = update.outputs.get("generation_logits", ())[:tokens]
        if self.params.return_context_logits:
            found["context_logits"] = update.outputs.get("context_logits", ())
        if self.params.prompt_logprobs is not None:
            found["prompt_logprobs"] = list(map(_readable, self._prompt_entries(update)))
        return found

    def _prompt_entries(self, update: Update) -> Sequence[TokenLogprobs]:
        """The first sample has the prompt's entries as they come, the others all of them with their first token."""
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


class _Waiting:
    """What steps brought that their owner is not told yet, in lists that grow: a delta a token would be a heap."""

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
        """All of it as one delta, which ends as the last one does."""
        every: dict[str, Any] = {"text": "".join(self._texts), "outputs": self._outputs, **self._lists}
        return last._replace(**every)


class PromptLogprobs:
    """What all samples of a prompt report of it: one entry a token, of the logits after it and the id that follows.

    As in TensorRT-LLM entry i has the `count` likeliest after token i, and token i + 1; the last has a sample's first.

    Attributes:
        reported: the entries of the first sample, which computes the prompt, as far as its owner has them.
    """

    def __init__(self, prompt: Sequence[int], count: int | None) -> None:
        self._prompt = prompt
        self._count = count or 0
        self._seen = 0
        self._logits: Logits | None = None
        self.reported: list[TokenLogprobs] = []

    def take(self, update: Update) -> list[TokenLogprobs]:
        """The entries of the prompt's next logits, which an update of its first sample brings."""
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
        """The last entry of a sample that begins with `token`; none where the first sample ended before it."""
        return [] if self._logits is None else [self._entry(self._logits, token)]

    def _entry(self, logits: Logits, token: int) -> TokenLogprobs:
        top, own, rank = top_logprobs(logits, self._count, token)
        return TokenLogprobs(token, own, rank, tuple(top))


def _readable(entry: TokenLogprobs) -> dict[int, Logprob]:
    """The alternatives by id, best first, and the drawn token after them if it is not one of them."""
    best = {token: Logprob(logprob, rank) for rank, (token, logprob) in enumerate(entry.top, start=1)}
    return best | {entry.token: Logprob(entry.logprob, entry.rank)}


class OutputThread:
    """The thread between the engine and the users; every update's owner is a OutputProcessor."""

    def __init__(self) -> None:
        self._updates: queue.SimpleQueue[Sequence[Update] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="trtllm_jax-postprocess", daemon=True)
        self._thread.start()

    def put(self, updates: Sequence[Update]) -> None:
        """Hand over one step's updates; never blocks."""
        self._updates.put(updates)

    def end(self) -> None:
        """Nothing more is handed over; what was will be delivered."""
        self._updates.put(None)

    def join(self) -> None:
        """Wait for that, where this is another thread and `end` was called or will be."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while (updates := self._updates.get()) is not None:
            deliver(updates)
            del updates  # what has ended is its owner's alone, also while this thread waits


def deliver(updates: Iterable[Update]) -> None:
    """Give each update to its owner. One sequence's fault reaches its owner and nobody else."""
    for update in updates:
        try:
            update.request.owner.take(update)
        except Exception as failure:
            try:
                update.request.owner.take(Update(update.request, error=detached(failure)))
            except Exception:
                logger.exception("a result could not be told its failure")
