"""POST /v1/completions."""

from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trtllm_jax.requests.builder import shown_prompt
from trtllm_jax.requests.outputs import CompletionOutput, RequestOutput
from trtllm_jax.requests.sampling_params import SamplingParams
from trtllm_jax.serve.http.body import read_model
from trtllm_jax.serve.http.endpoint import BODY_ERRORS, Endpoint
from trtllm_jax.serve.http.errors import bad
from trtllm_jax.serve.http.exchange import Exchange, submit_each
from trtllm_jax.serve.http.limits import check_completion
from trtllm_jax.serve.http.sse import Envelope, EventStream, as_json, merged
from trtllm_jax.serve.logprobs import for_completions
from trtllm_jax.serve.protocol.completions import CompletionRequest, CompletionResponse
from trtllm_jax.serve.sampling import guidance, sampling_params
from trtllm_jax.serve.server import Server
from trtllm_jax.serve.token_texts import Places, answer_places, places_in_prompt
from trtllm_jax.serve.usage import usage
from trtllm_jax.text.inputs import Prompt

_DEFAULT_TOKENS = 16


async def create_completion(server: Server, request: Request) -> Response:
    """The texts, at once or as a stream."""
    exchange = Exchange(server, request, "cmpl-")
    body, heavy = await read_model(request, CompletionRequest, server.settings, server.pool)
    model = server.check_model(body.model)
    check_completion(body, server.settings.limits)
    texts = Texts(server, body)

    def submit() -> list[RequestOutput]:
        params = exchange.params = texts.params
        salt = {"cache_salt": body.cache_salt} if body.cache_salt else {}

        def make(prompt: Any) -> RequestOutput:
            key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
            return server.llm.generate_async({key: prompt, **salt}, params, streaming=bool(body.stream))

        return submit_each(body.prompts, make)

    # A constraint takes a while to compile: others of this process do not wait for it.
    await exchange.submit(submit, heavy or body.response_format is not None)
    head = {
        "id": exchange.id,
        "object": "text_completion",
        "created": exchange.created,
        "model": model,
        "system_fingerprint": server.fingerprint,
    }
    if body.stream:
        return EventStream(exchange, _events(exchange, body, texts, head))
    async with exchange.guarded(request.receive):
        outputs = [await output.aresult() for output in exchange.outputs]
        exchange.check()
    choices = [
        texts.choice(output, one, number * (body.n or 1) + one.index, whole=True)
        for number, output in enumerate(outputs)
        for one in output.outputs
    ]
    whole = {**head, "choices": choices, "usage": usage(outputs, texts.shown)}
    return Response(as_json(whole), media_type="application/json")


class Texts:
    """What of the outputs a request wants to see, and in which form.

    `max_tokens` 0 with `echo` shows the prompt alone, as programs that score texts ask for it: one token is generated
    and kept back.
    """

    def __init__(self, server: Server, body: CompletionRequest) -> None:
        if body.max_tokens == 0 and not body.echo:
            raise bad("max_tokens", "max_tokens = 0 gives nothing: use at least 1, or echo = true")
        self._server = server
        self._body = body
        self.shown = body.max_tokens != 0
        self._plain = body.logprobs is None and body.detokenize
        self._begun: set[int] = set()
        self._answers: dict[int, Places] = {}

    @cached_property
    def params(self) -> SamplingParams:
        """What the engine is asked for."""
        body = self._body
        return sampling_params(
            body,
            self._server.llm.facts.vocab,
            add_special_tokens=body.add_special_tokens,
            exclude_input_from_output=not body.echo,
            guided_decoding=guidance(body.response_format),
            logprobs=body.logprobs,
            max_tokens=(_DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens) or 1,
            prompt_logprobs=body.logprobs if body.echo else None,
        )

    def choice(self, output: RequestOutput, one: CompletionOutput, index: int, *, whole: bool) -> dict[str, Any]:
        """All of an answer, or what its last step added; the prompt before it where it is to be echoed."""
        begins = whole or index not in self._begun
        self._begun.add(index)
        text, tokens = (one.text, one.token_ids) if begins else (one.text_diff, one.token_ids_diff)
        finish = one.finish_reason
        if not self.shown:
            text, tokens = (self._prompt_text(output), output.prompt_token_ids) if begins else ("", [])
            finish = finish and "length"
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        choice["stop_reason"] = one.stop_reason if self.shown else None
        if self._body.logprobs is not None:
            choice["logprobs"] = self._logprobs(output, one, index, begins, tokens)
        if not self._body.detokenize:
            choice["token_ids"] = list(tokens)
        return choice

    def _logprobs(
        self, output: RequestOutput, one: CompletionOutput, index: int, begins: bool, tokens: Sequence[int]
    ) -> dict[str, Any]:
        """Those of `tokens`, and of the token that ended the answer: whoever adds them up wants what was drawn."""
        texts, body = self._server.texts, self._body
        tokens, places, positions = list(tokens), [], []
        if begins:
            prompt, text = output.prompt_token_ids, ""
            if body.echo:
                text = self._prompt_text(output)
                places = places_in_prompt(texts, text, prompt, body.skip_special_tokens, body.add_special_tokens)
                positions = [{}, *one.prompt_logprobs[:-1]]
            self._answers[index] = answer_places(
                texts, prompt if body.echo else (), len(text), body.skip_special_tokens
            )
        if self.shown:
            positions += one.logprobs if begins else one.logprobs_diff
            if one.finish_reason and one.end_logprobs is not None:
                token, alternatives = one.end_logprobs
                tokens.append(token)
                positions.append(alternatives)
        places += map(self._answers[index].add, tokens[len(places) :])
        if not body.detokenize:
            places = [place._replace(offset=0) for place in places]
        return for_completions(texts, tokens, places, positions, body.logprobs or 0)

    def step(self, output: RequestOutput, one: CompletionOutput, index: int) -> bytes | None:
        """A stream's next choice; None where the last step brought nothing to show."""
        finish = None if one.finish_reason == "cancelled" else one.finish_reason
        if self._plain and not finish and not self._body.echo:
            text = one.text_diff
            if not text:
                return None
            self._begun.add(index)
            return b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":null,"stop_reason":null}' % (
                index,
                as_json(text),
            )
        if not one.token_ids_diff and not finish:
            return None
        return as_json(self.choice(output, one, index, whole=False))

    def _prompt_text(self, output: RequestOutput) -> str:
        return shown_prompt(Prompt(output.prompt, output.prompt_token_ids), self.params, self._server.llm.tokenizer)


async def _events(
    exchange: Exchange, body: CompletionRequest, texts: Texts, head: dict[str, Any]
) -> AsyncIterator[bytes]:
    options = body.stream_options
    envelope = Envelope(head, usage=options is not None and options.include_usage)
    counted = options is not None and options.continuous_usage_stats
    answers = body.n or 1

    async def of_one(output: RequestOutput, base: int) -> AsyncIterator[bytes]:
        ended: set[int] = set()
        async for step in output:
            events = []
            for one in step.outputs:
                if one.index in ended:
                    continue
                choice = texts.step(step, one, base + one.index)
                if one.finish_reason:
                    ended.add(one.index)
                if choice is None:
                    continue
                if counted:
                    events.append(envelope.with_usage(choice, usage(exchange.outputs, texts.shown)))
                else:
                    events.append(envelope.around(choice))
            if events:
                yield b"".join(events)

    streams = [of_one(output, number * answers) for number, output in enumerate(exchange.outputs)]
    async for piece in merged(streams):
        yield piece
    if options is not None and options.include_usage and not exchange.gone:
        yield envelope.with_usage(b"", usage(exchange.outputs, texts.shown))


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/completions",
        create_completion,
        "Create a completion",
        request=CompletionRequest,
        response=CompletionResponse,
        event=CompletionResponse,
        errors=BODY_ERRORS,
        generates=True,
    ),
)
