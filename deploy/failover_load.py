"""Clients as OpenAI's are: each sends one request after the other, streamed or not, and tries each once more."""

import contextlib
import itertools
import threading
import time
from dataclasses import dataclass
from typing import Any

from openai import APIError, APITimeoutError, OpenAI

PROMPTS = ("Once upon a time", "The capital of France is", "def main():", "Water boils at")
LONG = 2000
"""Tokens of an answer that nobody waits for."""


@dataclass(frozen=True)
class Call:
    """What became of one request.

    Attributes:
        streamed: whether it asked for a stream.
        began, ended: in seconds of `time.monotonic`.
        retries: that the client made, after HAProxy had done what it can.
        outcome: "whole", "cut" (a stream that had begun) or "failed".
        problem: what the client was told.
    """

    streamed: bool
    began: float
    ended: float
    retries: int
    outcome: str
    problem: str = ""

    @property
    def seconds(self) -> float:
        """From the request to the end of its answer, retries included."""
        return self.ended - self.began


class Load:
    """`clients` threads that call `base_url` until told to stop. A context manager.

    An answer is whole if it is, to the letter, what the server answered to the same greedy request before the load.

    Args:
        base_url: of the API.
        clients: threads; every second one streams.
        tokens: of each answer.
    """

    def __init__(self, base_url: str, clients: int, tokens: int) -> None:
        self._client = OpenAI(base_url=base_url, api_key="none", max_retries=1, timeout=120)
        self._tokens = tokens
        self._model = self._client.models.list().data[0].id
        self._expected = {prompt: self._ask(prompt)[0] for prompt in PROMPTS}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(clients)]
        self.calls: list[Call] = []

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def since(self, moment: float) -> list[Call]:
        """The calls that ended after `moment`."""
        return [call for call in list(self.calls) if call.ended > moment]

    def leave_early(self) -> None:
        """Two clients that leave: one reads a piece of its stream, the other waits 0.1 s for its whole answer."""
        with self._stream(PROMPTS[0], LONG).parse() as stream:
            next(iter(stream))
        with contextlib.suppress(APITimeoutError):
            hasty = self._client.with_options(timeout=0.1, max_retries=0)
            hasty.completions.create(**self._request(PROMPTS[0], LONG))

    def _run(self, index: int) -> None:
        for prompt in itertools.islice(itertools.cycle(PROMPTS), index, None):
            if self._stop.is_set():
                return
            self.calls.append(self._call(prompt, streamed=index % 2 == 1))

    def _call(self, prompt: str, streamed: bool) -> Call:
        began, retries, outcome, problem = time.monotonic(), 0, "failed", ""
        try:
            if streamed:
                answer = self._stream(prompt, self._tokens)
                retries, outcome = answer.retries_taken, "cut"
                text = "".join(choice.text for piece in answer.parse() for choice in piece.choices)
            else:
                text, retries = self._ask(prompt)
            if text == self._expected[prompt]:
                outcome = "whole"
            else:
                problem = f"{len(text)} characters that are not the expected {len(self._expected[prompt])}"
        except (APIError, OSError) as error:
            problem = f"{type(error).__name__}: {error}"
        except Exception as error:  # whatever the client's HTTP library raises inside a stream
            problem = f"{type(error).__module__}.{type(error).__name__}: {error}"
        return Call(streamed, began, time.monotonic(), retries, outcome, problem)

    def _ask(self, prompt: str) -> tuple[str, int]:
        answer = self._client.completions.with_raw_response.create(**self._request(prompt, self._tokens))
        return answer.parse().choices[0].text, answer.retries_taken

    def _stream(self, prompt: str, tokens: int) -> Any:
        return self._client.completions.with_raw_response.create(**self._request(prompt, tokens), stream=True)

    def _request(self, prompt: str, tokens: int) -> dict[str, Any]:
        greedy = {"temperature": 0, "extra_body": {"ignore_eos": True}}
        return {"model": self._model, "prompt": prompt, "max_tokens": tokens, **greedy}
