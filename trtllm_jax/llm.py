"""The `LLM` class: a model, an engine and a tokenizer behind TensorRT-LLM's Python API."""

import atexit
import itertools
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np

from trtllm_jax import compilation_cache, device_memory
from trtllm_jax.chat import Chat, Conversation, Tool, read_template
from trtllm_jax.detokenizer import IncrementalDetokenizer
from trtllm_jax.engine.config import EngineConfig
from trtllm_jax.engine.engine import Engine
from trtllm_jax.engine.programs import MAX_LOGPROBS
from trtllm_jax.engine.request import FinishReason, Request
from trtllm_jax.engine.scheduler import CapacityPolicy
from trtllm_jax.inputs import Prompt, PromptInputs, is_single, read_prompt
from trtllm_jax.llm_args import LlmArgs, parse_llm_args
from trtllm_jax.loading import load
from trtllm_jax.logger import progress, status
from trtllm_jax.outputs import RequestOutput
from trtllm_jax.postprocess import Postprocessor, Stream
from trtllm_jax.sampling_params import SamplingParams
from trtllm_jax.tokenizer import Tokenizer

_alive: weakref.WeakSet["LLM"] = weakref.WeakSet()


class LLM:
    """A language model ready to generate; a context manager. All methods may be called from any thread.

    Args:
        model: a folder with a Hugging Face checkpoint, a .gguf file, or the name of a model on the hub.
        tokenizer: a tokenizer or where to load one; the model's own by default.
        kwargs: TensorRT-LLM's arguments; `trtllm_jax.llm_args.LlmArgs` lists them.

    Raises:
        ValueError: an argument is wrong, unknown or not available in this release; names it, its value, the remedy.
        RuntimeError: there are fewer devices than the sizes ask for.
        MemoryError: model or cache do not fit the device; names the knob.
    """

    def __init__(self, model: str | Path, tokenizer: Any = None, **kwargs: Any) -> None:
        self._args = parse_llm_args(model=model, tokenizer=tokenizer, **kwargs)
        chat_template = read_template(self._args.chat_template)
        device_memory.claim()
        compilation_cache.enable()
        loaded = load(self._args)
        self._tokenizer = loaded.tokenizer
        self._chat = Chat(loaded.tokenizer, chat_template, self._args.allow_request_chat_template)
        self._end_ids = loaded.end_ids
        self._vocab: int = loaded.model.config.vocab
        self._postprocessor = Postprocessor()
        self._seeds = np.random.default_rng(0)
        self._request_ids = itertools.count(1)
        self._submitting = threading.Lock()
        try:
            with progress(None, "Compiling", unit="program") as bar:

                def show(done: int, total: int) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                self._engine = Engine(
                    loaded.model, loaded.params, loaded.mesh, _engine_config(self._args), self._postprocessor.put, show
                )
        except BaseException:
            self._postprocessor.close()
            raise
        self._announce(loaded.mesh.devices.flat[0].device_kind, loaded.params["embed"].dtype.name)
        _alive.add(self)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; `tokenizer.hf` is the transformers object. None with skip_tokenizer_init=True."""
        return self._tokenizer

    @property
    def llm_id(self) -> str:
        """A name that tells this object from others of the process."""
        return f"{self._args.model}-{id(self):x}"

    @property
    def compile_seconds(self) -> float:
        """How long sizing the cache and compiling every program took at the start."""
        return self._engine.start_up.compile_seconds

    @property
    def params(self) -> Any:
        """The weights that the engine reads, in `load_model`'s tree. They are its own: do not donate them."""
        return self._engine.params

    def update_weights(self, params: Any, *, copy: bool = False) -> None:
        """Other weights are in place when this returns; nothing is copied to the host, and nothing is compiled.

        They are waited for if they are still being computed. Whatever starts afterwards is computed with them alone:
        prefixes that were cached before are not found again. Requests that are running go on with them from their next
        step on, and keep the keys and values that they have; wait for the requests first where an answer must come from
        one set of weights.

        Without `copy` the engine reads your arrays, in the same buffers. A program of yours that takes them by donation
        deletes them: let it do so only while no request runs, and call this again before the next one. A step that
        finds them deleted ends the engine. With `copy` the engine has its own, at the price of their memory, and for
        the time of this call of another set.

        Args:
            params: the tree that `load_model`, `CausalLM.params` or `LLM.params` gives, in the shapes, dtypes and
                shardings of `LLM.params`. Numpy arrays and arrays that are not committed to a device may lie anywhere.
            copy: whether the engine takes copies on its devices.

        Raises:
            ValueError: names every array that is missing, unexpected, deleted, or of another shape, dtype or sharding;
                the engine goes on with what it has.
            EngineDeadError: the engine failed; its cause is the failure.
            RuntimeError: this LLM is shut down.
        """
        self._engine.update_weights(params, copy=copy)

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
        """The finished output of one prompt, or the outputs of a list of prompts in their order.

        Args:
            inputs: a str, a list of token ids, a dict with "prompt" or "prompt_token_ids", or a list of those.
            sampling_params: for all prompts, or one each; greedy decoding of 32 tokens by default.
            use_tqdm: show progress on a terminal.
            streaming: return at once; iterating an output gives it after every step.
            lora_request: not available in this release.

        Raises:
            ValueError, TypeError: an input or a parameter is wrong; nothing was started.
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
        """The output of one prompt, at once: call `result()`, await it, or iterate it with `for` or `async for`."""
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
        """`generate` for a conversation, or for a list of them: the model's chat template makes the prompt of each.

        Args:
            messages: dicts with "role" and "content" (a str, or OpenAI's text parts), or a list of such lists.
            sampling_params: as in `generate`, and so are `use_tqdm`, `streaming` and `lora_request`.
            tools: for the template: JSON schemas, or functions with type hints and a docstring that names arguments.
            documents: for the template: dicts with "title" and "text".
            chat_template: a Jinja text in place of the model's, where allow_request_chat_template=True was set.
            add_generation_prompt: whether the prompt ends with the beginning of an answer.
            continue_final_message: whether the answer goes on with the last message.
            chat_template_kwargs: the template's further variables.

        Raises:
            ValueError: a message or an argument is wrong, or the template refuses; nothing was started.
            EngineDeadError: the engine failed; its cause is the failure.
        """
        prompts = self._chat.prompts(
            messages,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.generate(prompts, sampling_params, use_tqdm, streaming=streaming, lora_request=lora_request)

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """The statistics of the engine's steps since the last call, in TensorRT-LLM's form; never waits."""
        return self._engine.drain_stats()

    def get_kv_cache_events(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """The prefix cache's events since the last call; [] unless kv_cache_config.event_buffer_max_size is set."""
        events = self._engine.cache_events
        return events.drain() if events else []

    async def get_stats_async(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """`get_stats` for callers that await."""
        return self.get_stats(timeout)

    async def get_kv_cache_events_async(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """`get_kv_cache_events` for callers that await."""
        return self.get_kv_cache_events(timeout)

    def get_kv_cache_capacity(self) -> dict[str, int]:
        """The KV pool's size in blocks and in tokens."""
        blocks, size = self._engine.kv_pages, self._engine.page_size
        return {"maxNumBlocks": blocks, "tokensPerBlock": size, "maxNumTokens": blocks * size}

    def shutdown(self) -> None:
        """End every request as cancelled, stop the threads and free the device's memory; may be called again."""
        _alive.discard(self)
        engine = self.__dict__.get("_engine")
        if engine is not None:
            engine.close()
            self._postprocessor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def __del__(self) -> None:
        self.shutdown()

    def __getstate__(self) -> Any:
        raise RuntimeError("LLM cannot be pickled: it holds threads and device memory; create one in each process")

    def _submit(self, inputs: Sequence[Any], params: Sequence[SamplingParams], streaming: bool) -> list[RequestOutput]:
        """Check every prompt, then queue them all; nothing is queued if one is wrong."""
        for each in params:
            self._check(each)
            if streaming and each.sequences > each.n:
                raise ValueError(
                    f"SamplingParams.best_of = {each.best_of} is invalid with streaming: which n = {each.n} are "
                    "the best is known at the end; leave best_of out or streaming"
                )
        prompts = [
            read_prompt(one, each, self._tokenizer, self._vocab) for one, each in zip(inputs, params, strict=True)
        ]
        interval = self._args.stream_interval if streaming else None
        with self._submitting:
            made = [self._request(prompt, each, interval) for prompt, each in zip(prompts, params, strict=True)]
        self._engine.submit([request for _, requests in made for request in requests])
        return [output for output, _ in made]

    def _check(self, params: Any) -> None:
        if not isinstance(params, SamplingParams):
            raise TypeError(
                f"sampling_params must be a SamplingParams or a list of them, one a prompt; got {type(params).__name__}"
            )
        if params.logprobs is not None and params.logprobs > MAX_LOGPROBS:
            raise ValueError(f"SamplingParams.logprobs = {params.logprobs} is invalid: use at most {MAX_LOGPROBS}")
        if params.stop_strings and self._tokenizer is None:
            raise ValueError("SamplingParams.stop needs a tokenizer; use stop_token_ids with skip_tokenizer_init=True")
        self._check_ids(params)
        if params.bad_words and self._tokenizer is None:
            raise ValueError("SamplingParams.bad needs a tokenizer; use bad_token_ids with skip_tokenizer_init=True")
        if params.apply_batched_logits_processor and self._args.batched_logits_processor is None:
            raise ValueError(
                "SamplingParams.apply_batched_logits_processor = True needs a processor: give "
                "LLM(batched_logits_processor=...)"
            )
        if self._tokenizer is None and params.end_id is None and not params.ignore_eos:
            raise ValueError("tokenizer is required to reset end_id: with skip_tokenizer_init=True give end_id")

    def _check_ids(self, params: SamplingParams) -> None:
        """What speaks of the vocabulary must fit the model's."""
        reset = [] if params.top_p_reset_ids is None else [params.top_p_reset_ids]
        for field, ids in (("bad_token_ids", params.bad_token_ids or ()), ("top_p_reset_ids", reset)):
            wrong = [token for token in ids if token >= self._vocab]
            if wrong:
                raise ValueError(
                    f"SamplingParams.{field} holds {wrong[0]}; ids of this model are 0 to {self._vocab - 1}"
                )
        if params.embedding_bias is not None and len(params.embedding_bias) != self._vocab:
            raise ValueError(
                f"SamplingParams.embedding_bias has {len(params.embedding_bias)} entries; this model's vocabulary has "
                f"{self._vocab}"
            )

    def _bad_ids(self, params: SamplingParams) -> list[tuple[int, ...]]:
        """The ids of each bad word, at the beginning of a text and within one."""
        if self._tokenizer is None:
            return []
        spellings = [spelling for word in params.bad_words for spelling in (word, f" {word}")]
        encoded = [tuple(self._tokenizer.encode(spelling, add_special_tokens=False)) for spelling in spellings]
        return list(dict.fromkeys(ids for ids in encoded if ids))

    def _request(
        self, prompt: Prompt, params: SamplingParams, interval: int | None
    ) -> tuple[RequestOutput, list[Request]]:
        """A result and the sequences that will fill it."""
        max_tokens = self._fitting_max_tokens(prompt, params)
        stops = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            stops |= self._end_ids if params.end_id is None else {params.end_id}
        rule = params.resolved()
        seed = rule.seed if rule.seed is not None else int(self._seeds.integers(1 << 64, dtype=np.uint64))
        edits = params.edits(frozenset(stops), self._bad_ids(params))
        best_of_more = params.sequences > params.n
        requests: list[Request] = []
        # The result must not keep this LLM alive, only the engine that fills it.
        end = self._engine.finish

        def abort() -> None:
            for request in requests:
                end(request, FinishReason.CANCELLED)

        output = RequestOutput(next(self._request_ids), prompt.text, prompt.ids, params.sequences, abort, keep=params.n)
        if not params.exclude_input_from_output:
            output._begin_with(prompt.ids, self._text_of(prompt, params))
        for index in range(params.sequences):
            stream = Stream(
                output,
                index,
                params,
                self._detokenizer(params),
                interval,
                lambda request: end(request, FinishReason.STOP),
            )
            requests.append(
                Request(
                    prompt=prompt.ids,
                    max_tokens=max_tokens,
                    sampling=replace(rule, seed=(seed + index) % (1 << 64)),
                    stop_ids=frozenset(stops),
                    # The best are chosen by log-probabilities.
                    num_logprobs=0 if params.logprobs is None and best_of_more else params.logprobs,
                    edits=edits,
                    keep_logits=params.return_generation_logits,
                    keep_context=index == 0 and (params.return_context_logits or params.prompt_logprobs is not None),
                    id=output.request_id,
                    salt=prompt.salt,
                    parent=requests[0] if requests else None,
                    owner=stream,
                )
            )
        return output, requests

    def _text_of(self, prompt: Prompt, params: SamplingParams) -> str:
        """The text that the prompt's ids stand for, which may be the end of what was given; "" where none is wanted."""
        if self._tokenizer is None or not params.detokenize:
            return ""
        if prompt.text is not None and params.truncate_prompt_tokens is None:
            return prompt.text
        return self._tokenizer.decode(prompt.ids, params.skip_special_tokens)

    def _fitting_max_tokens(self, prompt: Prompt, params: SamplingParams) -> int:
        length, limit = len(prompt.ids), self._engine.limits.max_seq_len
        if self._args.max_input_len is not None and length > self._args.max_input_len:
            raise ValueError(
                f"the prompt has {length} tokens, max_input_len is {self._args.max_input_len}; shorten the prompt, set "
                "truncate_prompt_tokens or raise max_input_len"
            )
        if length >= limit:
            raise ValueError(
                f"the prompt has {length} tokens and max_seq_len is {limit}, which leaves no room for an answer; "
                "shorten the prompt, set truncate_prompt_tokens or raise max_seq_len"
            )
        return min(params.max_tokens, limit - length)

    def _detokenizer(self, params: SamplingParams) -> IncrementalDetokenizer | None:
        if self._tokenizer is None or not params.detokenize:
            return None
        return IncrementalDetokenizer(
            self._tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop_strings,
            include_stop=params.include_stop_str_in_output,
        )

    @staticmethod
    def _wait(outputs: Sequence[RequestOutput], show_progress: bool) -> None:
        """Wait for all; if this is interrupted or one fails, none of them goes on."""
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

    def _announce(self, device: str, dtype: str) -> None:
        facts = self._engine.start_up
        limits = facts.limits
        status(
            f"trtllm_jax: {self._args.model} on {self._args.tensor_parallel_size} x {device}, {dtype}; "
            f"KV cache of {facts.kv_tokens} tokens in {facts.kv_dtype}; up to {limits.max_batch_size} sequences of "
            f"{limits.max_seq_len} tokens, {limits.max_num_tokens} tokens a step; steps for {facts.token_buckets} "
            f"tokens and {facts.row_buckets} rows, ready in {facts.compile_seconds:.1f} s"
        )


@atexit.register
def _shut_down_all() -> None:
    for llm in list(_alive):
        llm.shutdown()


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    if isinstance(params, Sequence):
        if len(params) != prompts:
            raise ValueError(f"sampling_params has {len(params)} entries for {prompts} prompts; give one or one each")
        return list(params)
    return [SamplingParams() if params is None else params] * prompts


def _refuse_lora(lora_request: Any) -> None:
    if lora_request is not None:
        raise ValueError("lora_request is not available in this release; leave it out")


def _engine_config(args: LlmArgs) -> EngineConfig:
    """The engine's settings; sizes that nobody named are the engine's to choose, within TensorRT-LLM's defaults."""
    named = args.model_fields_set
    cache = args.kv_cache_config
    stats = args.max_stats_len if args.iter_stats_max_iterations is None else args.iter_stats_max_iterations
    return EngineConfig(
        max_batch_size=args.max_batch_size if "max_batch_size" in named else None,
        max_num_tokens=args.max_num_tokens if "max_num_tokens" in named else None,
        max_seq_len=args.max_seq_len,
        page_size=cache.tokens_per_block,
        kv_tokens=cache.max_tokens,
        kv_fraction=cache.free_gpu_memory_fraction,
        kv_dtype=None if cache.dtype == "auto" else cache.dtype,
        reuse=cache.enable_block_reuse,
        policy=CapacityPolicy(args.scheduler_config.capacity_scheduler_policy.value),
        look_ahead=not args.disable_overlap_scheduler,
        batched_processor=args.batched_logits_processor,
        event_buffer=cache.event_buffer_max_size,
        stats_length=stats,
    )
