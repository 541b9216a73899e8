"""The API that every `LLM` has, whether its engine runs in this process or in another; imports no jax."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, overload

from trtllm_jax.common.errors import EngineDeadError
from trtllm_jax.engine.request import FinishReason, Request
from trtllm_jax.logger import progress
from trtllm_jax.requests.builder import EngineFacts, RequestBuilder
from trtllm_jax.requests.outputs import EncoderOutput, RequestOutput, vectors_of
from trtllm_jax.requests.sampling_params import SamplingParams
from trtllm_jax.requests.scoring import PairScoring
from trtllm_jax.text.chat import Chat, Conversation, Tool
from trtllm_jax.text.inputs import PromptInputs, check_ids, is_single
from trtllm_jax.text.tokenizer import Tokenizer


class EnginePort(Protocol):
    """The interface of an engine: it takes sequences, and passes their updates to their owners."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue sequences, all or none."""

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a sequence soon; no effect if it has ended."""

    def refuse_own_thread(self) -> None:
        """RuntimeError if called in a thread that delivers results, where waiting for one would deadlock."""


class BaseLLM(ABC):
    """Generation over an engine; all methods may be called from any thread."""

    _tokenizer: Tokenizer | None
    _chat: Chat
    builder: RequestBuilder
    """Makes results and sequences from prompts."""
    port: EnginePort
    """The engine, for callers that build their own sequences."""

    def _connect(self, tokenizer: Tokenizer | None, chat: Chat, facts: EngineFacts, port: EnginePort) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self.port = port
        self.builder = RequestBuilder(facts, tokenizer, port.finish, port.refuse_own_thread)

    @property
    def facts(self) -> EngineFacts:
        """The engine's limits: vocabulary size, lengths, batch size, end ids."""
        return self.builder.facts

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; `tokenizer.hf` is the transformers object. None with skip_tokenizer_init=True."""
        return self._tokenizer

    @property
    def chat_template(self) -> str | None:
        """The chat template's Jinja text, that for tools if the model has a separate one; None without a template."""
        return self._chat.template_for_tools

    @overload
    def generate(
        self,
        inputs: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
        *,
        streaming: bool = False,
        lora_request: None = None,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        streaming: bool = False,
        lora_request: None = None,
    ) -> Any: ...

    def generate(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        streaming: bool = False,
        lora_request: None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """The finished output of one prompt, or the outputs of a list of prompts in the same order.

        Args:
            inputs: a str, a list of token ids, a dict with "prompt" or "prompt_token_ids", or a list of those.
            sampling_params: one for all prompts, or a list with one for each; greedy decoding of 32 tokens by default.
            use_tqdm: show a progress bar on a terminal.
            streaming: return at once; iterating over an output yields it after every step.
            lora_request: not available in this release.

        Raises:
            ValueError, TypeError: an input or a parameter is invalid; no request was started.
            EngineDeadError: the engine failed; its cause is the failure.
        """
        _refuse_lora(lora_request)
        single = is_single(inputs)
        prompts = [inputs] if single else list(inputs)
        outputs = self._submit(prompts, _one_each(sampling_params, len(prompts)), streaming)
        if not streaming:
            self._wait(outputs, use_tqdm and not single)
        return outputs[0] if single else outputs

    def generate_async(
        self,
        inputs: PromptInputs,
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        lora_request: None = None,
    ) -> RequestOutput:
        """The output of one prompt, returned at once: call `result()`, await it, or use `for` or `async for`."""
        _refuse_lora(lora_request)
        if not is_single(inputs):
            raise TypeError("generate_async takes one prompt; call it for each, or use generate for a list")
        return self._submit([inputs], [sampling_params or SamplingParams()], streaming)[0]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        streaming: bool = False,
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora_request: None = None,
    ) -> Any:
        """`generate` for a conversation or a list of them, each made into a prompt by the model's chat template.

        Args:
            messages: dicts with "role" and "content" (a str, or OpenAI's text parts), or a list of such lists.
            sampling_params, use_tqdm, streaming, lora_request: as in `generate`.
            tools: JSON schemas, or functions with type hints and a docstring that documents the arguments.
            documents: dicts with "title" and "text", for templates that support them.
            chat_template: the name of one of the model's templates, if it has several; or a Jinja text to use instead,
                if the LLM has allow_request_chat_template=True.
            add_generation_prompt: whether the prompt ends with the header of an assistant message.
            continue_final_message: whether the answer continues the last message.
            chat_template_kwargs: further variables of the template.

        Raises:
            ValueError: a message or an argument is invalid, or the template raises; no request was started.
            EngineDeadError: the engine failed; its cause is the failure.
        """
        prompts = self._chat_prompts(
            messages,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.generate(prompts, sampling_params, use_tqdm, streaming=streaming, lora_request=lora_request)

    @overload
    def embed(
        self,
        inputs: str | Sequence[int],
        use_tqdm: bool = True,
        *,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> RequestOutput: ...

    @overload
    def embed(
        self,
        inputs: Any,
        use_tqdm: bool = True,
        *,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> Any: ...

    def embed(
        self,
        inputs: Any,
        use_tqdm: bool = True,
        *,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """The output of one prompt, or of a list of prompts, with `embedding` set.

        An embedding is made of the hidden states after the model's last layer, float32 [embed], as a
        sentence-transformers folder states: that of the first or of the last token, or their mean; divided by its L2
        norm, or not. Where nothing is stated it is divided, and is a decoder's last hidden state or an encoder's mean.
        If a model needs an end-of-sequence token, its tokenizer has to add it. A decoder's prompts are computed like
        any others: in chunks, beside other requests, and with the prefix cache; other models compute each text whole.

        Args:
            inputs: as for `generate`.
            use_tqdm: show a progress bar on a terminal.
            add_special_tokens: whether the tokenizer adds its special tokens to a text.
            truncate_prompt_tokens: keep that many of the last tokens; where texts are computed whole, of the first
                ones, with the special tokens around them.

        Raises:
            ValueError, TypeError: an input is invalid, or the model is a classifier; no request was started.
            EngineDeadError: the engine failed; its cause is the failure.
        """
        self._refuse_classifier()
        single = is_single(inputs)
        outputs = self._embed([inputs] if single else list(inputs), add_special_tokens, truncate_prompt_tokens)
        self._wait(outputs, use_tqdm and not single)
        return outputs[0] if single else outputs

    def embed_async(
        self, inputs: PromptInputs, *, add_special_tokens: bool = True, truncate_prompt_tokens: int | None = None
    ) -> RequestOutput:
        """The output of `embed` for one prompt, returned at once: call `result()` or await it."""
        if not is_single(inputs):
            raise TypeError("embed_async takes one prompt; call it for each, or use embed for a list")
        self._refuse_classifier()
        return self._embed([inputs], add_special_tokens, truncate_prompt_tokens)[0]

    def encode(
        self,
        inputs: Any,
        use_tqdm: bool = True,
        *,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> Any:
        """A classifier's logits for one text or pair of texts, an `EncoderOutput`; a list of them for a list.

        Args:
            inputs: a str, a list of token ids, a dict with "prompt" and perhaps "text_pair" or with "prompt_token_ids"
                and perhaps "token_type_ids", or a list of those.
            use_tqdm, add_special_tokens, truncate_prompt_tokens: as for `embed`.

        Raises:
            RuntimeError: the model is no classifier, or the LLM was shut down meanwhile.
            ValueError, TypeError: an input is invalid; no request was started.
            EngineDeadError: the engine failed; its cause is the failure.
        """
        if self.facts.task != "classify":
            raise RuntimeError("encode needs a sequence classifier, and this model has no classes: use embed")
        single = is_single(inputs)
        outputs = self._embed([inputs] if single else list(inputs), add_special_tokens, truncate_prompt_tokens)
        self._wait(outputs, use_tqdm and not single)
        found = [
            EncoderOutput(vector, output.prompt_token_ids, output.prompt)
            for vector, output in zip(vectors_of(outputs), outputs, strict=True)
        ]
        return found[0] if single else found

    def score(
        self,
        queries: str | Sequence[str],
        texts: str | Sequence[str],
        use_tqdm: bool = True,
        *,
        truncate_prompt_tokens: int | None = None,
    ) -> list[float]:
        """The scores of pairs of texts: a cross-encoder's, as it states them; else the cosines of embeddings.

        Args:
            queries: the first text of each pair, or one for all.
            texts: the second ones.
            use_tqdm, truncate_prompt_tokens: as for `embed`.

        Raises:
            ValueError, TypeError: an input is invalid, or the model has several classes.
            EngineDeadError: the engine failed; its cause is the failure.
            RuntimeError: the LLM was shut down meanwhile.
        """
        scoring = self.pair_scoring(queries, texts)
        outputs = self._embed(scoring.prompts, True, truncate_prompt_tokens)
        self._wait(outputs, use_tqdm and len(outputs) > 1)
        return scoring.scores(outputs)

    def pair_scoring(self, queries: str | Sequence[str], texts: str | Sequence[str]) -> PairScoring:
        """The prompts of `score`, for callers that compute them with `encode_async`."""
        pair = [[each] if isinstance(each, str) else list(each) for each in (queries, texts)]
        if not all(isinstance(text, str) for some in pair for text in some):
            raise TypeError("score takes texts: give a str or a list of str for each side of the pairs")
        return PairScoring(self.facts, *pair)

    def encode_async(self, inputs: PromptInputs, *, truncate_prompt_tokens: int | None = None) -> RequestOutput:
        """The output of one prompt or pair, at once, whose `embedding` is its embedding or a classifier's logits."""
        return self._embed([inputs], True, truncate_prompt_tokens)[0]

    def _refuse_classifier(self) -> None:
        if self.facts.task == "classify":
            raise ValueError("this model is a sequence classifier and has no embeddings: use LLM.encode")

    def chat_prompt(self, messages: Conversation, **how: Any) -> dict[str, Any]:
        """The prompt that `chat` makes of one conversation, for `generate_async`; takes the arguments of `chat`."""
        if not messages or not isinstance(messages[0], Mapping):
            raise ValueError("messages is not a conversation: give a list of at least one message")
        prompt = self._chat_prompts(messages, **how)
        assert isinstance(prompt, dict)
        return prompt

    def _chat_prompts(self, messages: Any, **how: Any) -> dict[str, Any] | list[dict[str, Any]]:
        """The chat template's prompts. ValueError if the model generates none or lacks one of the token ids."""
        self.facts.require_generation()
        prompts = self._chat.prompts(messages, **how)
        for prompt in [prompts] if isinstance(prompts, dict) else prompts:
            check_ids("messages", prompt["prompt_token_ids"], self.facts.vocab, self._tokenizer)
        return prompts

    @abstractmethod
    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """The statistics of the engine's steps since the last call, in TensorRT-LLM's form."""

    @abstractmethod
    def get_kv_cache_events(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """The KV cache events since the last call; [] unless kv_cache_config.event_buffer_max_size is set."""

    @abstractmethod
    def get_kv_cache_capacity(self) -> dict[str, int]:
        """The KV pool's size in blocks and in tokens."""

    @property
    @abstractmethod
    def failure(self) -> EngineDeadError | None:
        """The failure that ended the engine; None while it runs and after a shutdown."""

    async def get_stats_async(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """`get_stats` for async callers."""
        return await asyncio.to_thread(self.get_stats, timeout)

    async def get_kv_cache_events_async(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """`get_kv_cache_events` for async callers."""
        return await asyncio.to_thread(self.get_kv_cache_events, timeout)

    def _submit(self, inputs: Sequence[Any], params: Sequence[SamplingParams], streaming: bool) -> list[RequestOutput]:
        """Check every prompt, then queue them all; nothing is queued if one is invalid."""
        return self._queue(self.builder.requests(inputs, params, streaming))

    def _embed(self, inputs: Sequence[Any], special: bool, truncated: int | None) -> list[RequestOutput]:
        params = SamplingParams(
            max_tokens=1,
            ignore_eos=True,
            detokenize=False,
            add_special_tokens=special,
            truncate_prompt_tokens=truncated,
        )
        return self._queue(self.builder.requests(inputs, [params] * len(inputs), streaming=False, embed=True))

    def _queue(self, made: Sequence[tuple[RequestOutput, Sequence[Request]]]) -> list[RequestOutput]:
        self.port.submit([request for _, requests in made for request in requests])
        return [output for output, _ in made]

    @staticmethod
    def _wait(outputs: Sequence[RequestOutput], show_progress: bool) -> None:
        """Wait for all outputs; abort all of them if one fails or the wait is interrupted."""
        try:
            if not show_progress:
                for output in outputs:
                    output.result()
                return
            with progress(len(outputs), "Processed requests") as bar:
                for output in outputs:
                    output.result()
                    bar.update()
        except BaseException:
            for output in outputs:
                output.abort()
            raise


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    if isinstance(params, Sequence):
        if len(params) != prompts:
            raise ValueError(f"sampling_params has {len(params)} entries for {prompts} prompts; give one, or one each")
        return list(params)
    return [SamplingParams() if params is None else params] * prompts


def _refuse_lora(lora_request: Any) -> None:
    if lora_request is not None:
        raise ValueError("lora_request is not available in this release; leave it out")
