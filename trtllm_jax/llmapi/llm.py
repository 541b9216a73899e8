"""The `LLM` class: a model, an engine and a tokenizer behind TensorRT-LLM's Python API."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trtllm_jax.common.errors import EngineDeadError
from trtllm_jax.engine import compilation_cache, device_memory
from trtllm_jax.engine.build import build_engine
from trtllm_jax.engine.config import EngineConfig
from trtllm_jax.engine.limits import CapacityPolicy
from trtllm_jax.functional.model import Model
from trtllm_jax.llmapi.base_llm import BaseLLM
from trtllm_jax.llmapi.llm_args import LlmArgs, parse_llm_args
from trtllm_jax.llmapi.loading import load
from trtllm_jax.logger import progress, status
from trtllm_jax.requests.builder import EngineFacts, Task
from trtllm_jax.requests.output_processor import OutputThread
from trtllm_jax.text.chat import Chat, read_template


class LLM(BaseLLM):
    """A language model with its engine and tokenizer; a context manager. All methods are thread-safe.

    Args:
        model: a folder with a Hugging Face checkpoint, a .gguf file, or the name of a model on the hub.
        tokenizer: a transformers tokenizer, or the path or name of one; the model's own by default.
        kwargs: TensorRT-LLM's arguments; `trtllm_jax.llmapi.llm_args.LlmArgs` lists them.

    Raises:
        ValueError: an argument is invalid, unknown or not available in this release; the message says how to fix it.
        RuntimeError: there are fewer devices than tensor_parallel_size.
        MemoryError: the model or the cache does not fit the device; the message names the argument to change.
    """

    @compilation_cache.kept()
    def __init__(self, model: str | Path, tokenizer: Any = None, **kwargs: Any) -> None:
        self._args = parse_llm_args(model=model, tokenizer=tokenizer, **kwargs)
        chat_template = read_template(self._args.chat_template)
        device_memory.claim()
        loaded = load(self._args)
        chat = Chat(loaded.tokenizer, chat_template, self._args.allow_request_chat_template)
        self._postprocessor = OutputThread()
        try:
            with progress(None, "Compiling", unit="program") as bar:

                def show(done: int, total: int) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                self._engine, self._start_up = build_engine(
                    loaded.model,
                    loaded.params,
                    loaded.mesh,
                    _engine_config(self._args),
                    self._postprocessor.put,
                    self._postprocessor.end,
                    show,
                )
        except BaseException:
            self._postprocessor.end()
            raise
        facts = EngineFacts(
            vocab=loaded.model.config.vocab,
            end_ids=loaded.end_ids | chat.turn_ends(loaded.end_ids),
            max_batch_size=self._engine.limits.max_batch_size,
            max_seq_len=self._engine.limits.max_seq_len,
            max_input_len=self._args.max_input_len,
            stream_interval=self._args.stream_interval,
            batched_processor=self._args.batched_logits_processor is not None,
            model_type=loaded.model_type,
            task=_task(loaded.model),
            class_names=loaded.class_names,
            class_activation=loaded.class_activation,
            score_activation=loaded.score_activation,
        )
        self._connect(loaded.tokenizer, chat, facts, self._engine)
        self._announce(loaded.mesh.devices.flat[0].device_kind, loaded.model.weight_dtype(loaded.params).name)

    @property
    def args(self) -> LlmArgs:
        """The validated arguments."""
        return self._args

    @property
    def llm_id(self) -> str:
        """A name that is unique among the LLMs of this process."""
        return f"{self._args.model}-{id(self):x}"

    @property
    def compile_seconds(self) -> float:
        """Seconds that the start took to size the cache and to compile the programs of the first request."""
        return self._start_up.compile_seconds

    @property
    def failure(self) -> EngineDeadError | None:
        """The failure that ended the engine; None while it runs and after a shutdown."""
        return self._engine.failure

    @property
    def params(self) -> Any:
        """The weights that the engine reads, in `load_model`'s tree. The engine owns them: do not donate them."""
        return self._engine.params

    def warm_up(self) -> None:
        """Compile all programs that are not compiled yet, so that no later request waits for the compiler.

        On a GPU the constructor has compiled all of them. On a CPU it compiles those of the smallest request; the
        others are compiled in the background, or with enforce_eager=True when a request needs them. RuntimeError if
        this LLM was shut down, EngineDeadError if the engine failed.
        """
        self._engine.compile_rest()

    def update_weights(self, params: Any, *, copy: bool = False) -> None:
        """Replace the engine's weights; nothing is copied to the host or compiled.

        The call waits until `params` are computed, and returns once the engine uses them. Requests that start
        afterwards use only the new weights, and no prefix that was cached before. Requests that are running use them
        from their next step on, and keep the keys and values computed before. If an answer must come from one set of
        weights, wait for the running requests before this call.

        Without `copy` the engine reads the buffers of your arrays. Donating these to another program deletes them: do
        so only while no request runs, and call this method again before the next request. A step that finds them
        deleted ends the engine. With `copy` the engine reads copies. They take as much memory again, and during this
        call the old weights are held as well.

        Args:
            params: the tree of `load_model`, `CausalLM.params` or `LLM.params`, with the shapes, dtypes and shardings
                of `LLM.params`. Numpy arrays, and arrays not committed to a device, are placed as needed.
            copy: whether the engine copies the arrays on its devices.

        Raises:
            ValueError: an array is missing, unexpected, deleted, or of another shape, dtype or sharding; the message
                names all of them, and the engine keeps its weights.
            EngineDeadError: the engine failed; its cause is the failure.
            RuntimeError: this LLM was shut down.
        """
        self._engine.update_weights(params, copy=copy)

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """The statistics of the engine's steps since the last call, in TensorRT-LLM's form; never waits."""
        return self._engine.drain_stats()

    def get_kv_cache_events(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """The KV cache events since the last call; [] unless kv_cache_config.event_buffer_max_size is set."""
        events = self._engine.cache_events
        return events.drain() if events else []

    def get_kv_cache_capacity(self) -> dict[str, int]:
        """The KV pool's size in blocks and in tokens."""
        blocks, size = self._engine.kv_pages, self._engine.page_size
        return {"maxNumBlocks": blocks, "tokensPerBlock": size, "maxNumTokens": blocks * size}

    def shutdown(self) -> None:
        """Cancel all requests, stop the threads and free the device memory; may be called more than once.

        This also happens when Python exits. If a logits processor calls it, it takes effect after the current step.
        """
        if self._engine.close():
            self._postprocessor.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def __del__(self) -> None:
        # Must not wait: the garbage collector may call this in any thread, even the engine's or one that holds a lock.
        if (engine := self.__dict__.get("_engine")) is not None:
            engine.abandon()

    def __getstate__(self) -> Any:
        raise RuntimeError("LLM cannot be pickled: it holds threads and device memory; create one in each process")

    def _announce(self, device: str, dtype: str) -> None:
        status(
            f"trtllm_jax: {self._args.model} on {self._args.tensor_parallel_size} x {device}, {dtype}; "
            f"{self._start_up.described}, ready in {self._start_up.compile_seconds:.1f} s"
        )


def _task(model: Model) -> Task:
    if model.cache_groups:
        return "generate"
    return "classify" if model.labels else "embed"


def _engine_config(args: LlmArgs) -> EngineConfig:
    """The engine's settings; sizes that were not given are None: the engine chooses them, up to `LlmArgs`' defaults."""
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
        overlap_scheduling=not args.disable_overlap_scheduler,
        batched_processor=args.batched_logits_processor,
        event_buffer=cache.event_buffer_max_size,
        stats_length=stats,
        eager=args.enforce_eager,
    )
