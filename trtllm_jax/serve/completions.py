"""POST /v1/completions."""

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trtllm_jax.outputs import CompletionOutput, RequestOutput
from trtllm_jax.serve.body import read_model
from trtllm_jax.serve.errors import bad
from trtllm_jax.serve.exchange import Exchange, submit_each
from trtllm_jax.serve.limits import check_completion
from trtllm_jax.serve.logprobs import for_completions
from trtllm_jax.serve.protocol_completions import CompletionRequest
from trtllm_jax.serve.sampling import guidance, sampling_params
from trtllm_jax.serve.server import Server
from trtllm_jax.serve.sse import Envelope, EventStream, as_json, merged
from trtllm_jax.serve.usage import usage

_DEFAULT_TOKENS = 16


async def answer(server: Server, request: Request) -> Response:
    """The texts, at once or as a stream."""
    exchange = Exchange(server, request, "cmpl-")
    body, heavy = await read_model(request, CompletionRequest, server.settings, server.pool)
    model = server.check_model(body.model)
    check_completion(body, server.settings.limits)
    texts = Texts(server, body)

    def submit() -> list[RequestOutput]:
        params = exchange.params = texts.params()
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
        self._offsets: dict[int, int] = {}

    def params(self) -> Any:
        """What the engine is asked for."""
        body = self._body
        return sampling_params(
            body,
            self._server.llm.facts.vocab,
            add_special_tokens=body.add_special_tokens,
            guided_decoding=guidance(body.response_format),
            logprobs=body.logprobs,
            max_tokens=(_DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens) or 1,
            prompt_logprobs=body.logprobs if body.echo else None,
        )

    def choice(self, output: RequestOutput, one: CompletionOutput, index: int, *, whole: bool) -> dict[str, Any]:
        """All of an answer, or what its last step added; the prompt before it where it is to be echoed."""
        begins = whole or index not in self._offsets
        text, tokens = (one.text, one.token_ids) if whole else (one.text_diff, one.token_ids_diff)
        logprobs = one.logprobs if whole else one.logprobs_diff
        finish = one.finish_reason
        if not self.shown:
            text, tokens, logprobs, finish = "", [], [], finish and "length"
        if begins and self._body.echo:
            text = self._prompt_text(output) + text
            tokens = [*output.prompt_token_ids, *tokens]
            logprobs = [*one.prompt_logprobs, *logprobs]
        offset = 0 if begins else self._offsets[index]
        self._offsets[index] = offset + len(text)
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        choice["stop_reason"] = one.stop_reason if self.shown else None
        if self._body.logprobs is not None:
            choice["logprobs"] = for_completions(self._server.texts, tokens, logprobs, self._body.logprobs, offset)
        if not self._body.detokenize:
            choice["token_ids"] = list(tokens)
        return choice

    def step(self, output: RequestOutput, one: CompletionOutput, index: int) -> bytes | None:
        """A stream's next choice; None where the last step brought nothing to show."""
        finish = None if one.finish_reason == "cancelled" else one.finish_reason
        if self._plain and not finish and not self._body.echo:
            text = one.text_diff
            if not text:
                return None
            return b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":null,"stop_reason":null}' % (
                index,
                as_json(text),
            )
        if not one.token_ids_diff and not finish:
            return None
        return as_json(self.choice(output, one, index, whole=False))

    def _prompt_text(self, output: RequestOutput) -> str:
        tokenizer = self._server.llm.tokenizer
        if not self._body.detokenize or tokenizer is None:
            return ""
        if output.prompt is not None and self._body.truncate_prompt_tokens is None:
            return output.prompt
        return tokenizer.decode(output.prompt_token_ids, self._body.skip_special_tokens)


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
