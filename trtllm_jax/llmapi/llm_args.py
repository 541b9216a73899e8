"""The arguments of ``LLM``, as strict records whose errors name the field, the value and the remedy."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, Strict, field_validator, model_validator

from trtllm_jax.common.numbers import INT32_MAX
from trtllm_jax.common.strict_model import (
    DType,
    StrictModel,
    refuse_two_values,
    shown_value,
)
from trtllm_jax.logger import logger

Size = Annotated[int, Field(ge=1, le=INT32_MAX)]
Length = Annotated[int, Field(ge=0, le=INT32_MAX)]
BatchSize = Annotated[int, Field(ge=1, le=1 << 14)]
"""Most sequences that run at once; bounded, because the number of programs to compile grows with it."""
StepTokens = Annotated[int, Field(ge=1, le=1 << 20)]
PageSize = Annotated[int, Field(ge=1, le=1 << 12)]


class BuildConfig(StrictModel):
    """TensorRT-LLM's build configuration: upper bounds of the engine, in sequences and tokens, and build switches.

    The fields below ``max_num_tokens`` have no effect, because XLA chooses shapes and precision itself.
    """

    _ignored: ClassVar = frozenset({"plugin_config", "auto_parallel_config", "monitor_memory", "visualize_network"})

    _unavailable: ClassVar = {
        "max_prompt_embedding_table_size": (0,),
        "kv_cache_type": (None, "paged"),
        "gather_context_logits": (False,),
        "gather_generation_logits": (False,),
        "enable_debug_output": (False,),
        "max_draft_len": (0,),
        "speculative_decoding_mode": (None, "none", "NONE"),
        "lora_config": (None,),
        "weight_sparsity": (False,),
        "weight_streaming": (False,),
        "use_strip_plan": (False,),
        "dry_run": (False,),
        "use_mrope": (False,),
    }

    max_input_len: Size = 1024
    max_seq_len: Size | None = None
    max_batch_size: BatchSize = 2048
    max_beam_width: Size = 1
    max_num_tokens: StepTokens = 8192
    opt_batch_size: Size = 8
    opt_num_tokens: Size | None = None
    max_encoder_input_len: Size = 1024
    strongly_typed: bool = True
    use_refit: bool = False
    weight_streaming: bool = False
    force_num_profiles: Size | None = None
    profiling_verbosity: Literal["layer_names_only", "detailed", "none"] = "layer_names_only"
    input_timing_cache: str | None = None
    output_timing_cache: str | None = "model.cache"


class KvCacheConfig(StrictModel):
    """Size, page size and reuse of the KV cache.

    The cache takes ``free_gpu_memory_fraction`` of the memory that is free after loading, and at most ``max_tokens``
    tokens (formerly ``max_tokens_in_paged_kv_cache``). ``tokens_per_block`` is the page size in tokens.
    """

    _ignored: ClassVar = frozenset(
        {"sink_token_length", "attention_dp_events_gather_period_ms", "mamba_ssm_philox_rounds", "max_util_for_resume"}
    )
    _unavailable: ClassVar = {
        "max_attention_window": (None,),
        "host_cache_size": (None, 0),
        "disk_cache_size": (None, 0),
        "disk_cache_path": (None,),
        "cross_kv_cache_fraction": (None,),
        "secondary_offload_min_priority": (None,),
        "kv_events_config": (None,),
        "use_uvm": (False,),
        "max_gpu_total_bytes": (0,),
        "iteration_stats_interval": (1,),
        "mamba_ssm_cache_dtype": ("auto",),
        "mamba_ssm_stochastic_rounding": (False,),
        "mamba_state_config": (None,),
        "use_kv_cache_manager_v2": ("auto", False),
        "enable_swa_scratch_reuse": (False,),
        "kv_cache_event_hash_algo": ("auto",),
        "enable_kv_pool_rebalance": (False,),
        "disk_prefetch_num_reqs": (0,),
        "fp8_context_mla_kv_len_cap": (None,),
        "pool_ratio": (None,),
        "avg_seq_len": (None,),
        "block_reuse_config": (None,),
    }

    enable_block_reuse: bool = True
    max_tokens: Size | None = None
    free_gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    tokens_per_block: PageSize = 32
    dtype: DType = "auto"
    event_buffer_max_size: Length = 0
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True

    @classmethod
    def _prepare(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        old = "max_tokens_in_paged_kv_cache"
        if old not in arguments:
            return arguments
        refuse_two_values(f"KvCacheConfig.{old}", arguments[old], "max_tokens", arguments.get("max_tokens"))
        return {"max_tokens": arguments[old]} | {name: value for name, value in arguments.items() if name != old}

    @field_validator("tokens_per_block")
    @classmethod
    def _page_is_power_of_two(cls, tokens: int) -> int:
        if tokens & (tokens - 1):
            raise ValueError(f"it should be a power of two, such as {1 << tokens.bit_length() - 1}")
        return tokens


class CapacitySchedulerPolicy(StrEnum):
    """Which requests are admitted: those whose whole KV cache can be reserved; or all that fit now, with preemption."""

    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    MAX_UTILIZATION = "MAX_UTILIZATION"
    STATIC_BATCH = "STATIC_BATCH"


class ContextChunkingPolicy(StrEnum):
    """How long prompts share the token budget of one step."""

    FIRST_COME_FIRST_SERVED = "FIRST_COME_FIRST_SERVED"
    EQUAL_PROGRESS = "EQUAL_PROGRESS"
    FORCE_CHUNK = "FORCE_CHUNK"


class SchedulerConfig(StrictModel):
    """How the scheduler chooses the requests of a step."""

    _ignored: ClassVar = frozenset({"use_python_scheduler", "enable_prefix_aware_scheduling"})
    _unavailable: ClassVar = {
        "capacity_scheduler_policy": (
            CapacitySchedulerPolicy.GUARANTEED_NO_EVICT,
            CapacitySchedulerPolicy.MAX_UTILIZATION,
        ),
        "context_chunking_policy": (None, ContextChunkingPolicy.FIRST_COME_FIRST_SERVED),
        "dynamic_batch_config": (None,),
        "waiting_queue_policy": ("fcfs",),
    }

    capacity_scheduler_policy: Annotated[CapacitySchedulerPolicy, Strict(False)] = (
        CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    )
    context_chunking_policy: Annotated[ContextChunkingPolicy, Strict(False)] | None = None


class QuantAlgo(StrEnum):
    """TensorRT-LLM's names of quantisation methods for weights, activations and the KV cache."""

    W8A16 = "W8A16"
    W4A16 = "W4A16"
    W4A16_AWQ = "W4A16_AWQ"
    W4A8_AWQ = "W4A8_AWQ"
    W8A16_GPTQ = "W8A16_GPTQ"
    W4A16_GPTQ = "W4A16_GPTQ"
    W8A8_SQ_PER_CHANNEL = "W8A8_SQ_PER_CHANNEL"
    W8A8_SQ_PER_TENSOR_PLUGIN = "W8A8_SQ_PER_TENSOR_PLUGIN"
    W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
    W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN = "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN"
    W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN = "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN"
    W4A8_QSERVE_PER_GROUP = "W4A8_QSERVE_PER_GROUP"
    W4A8_QSERVE_PER_CHANNEL = "W4A8_QSERVE_PER_CHANNEL"
    FP8 = "FP8"
    FP8_PER_CHANNEL_PER_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN"
    FP8_BLOCK_SCALES = "FP8_BLOCK_SCALES"
    INT8 = "INT8"
    MIXED_PRECISION = "MIXED_PRECISION"
    NVFP4 = "NVFP4"
    W4A8_NVFP4_FP8 = "W4A8_NVFP4_FP8"
    W4A8_MXFP4_FP8 = "W4A8_MXFP4_FP8"
    W4A8_MXFP4_MXFP8 = "W4A8_MXFP4_MXFP8"
    W4A16_MXFP4 = "W4A16_MXFP4"
    NO_QUANT = "NO_QUANT"


class QuantConfig(StrictModel):
    """How a model is quantised; in this release neither algorithm may be set."""

    quant_algo: Annotated[QuantAlgo, Strict(False)] | None = None
    kv_cache_quant_algo: Annotated[QuantAlgo, Strict(False)] | None = None
    group_size: Size = 128
    smoothquant_val: float = 0.5
    clamp_val: list[float] | None = None
    use_meta_recipe: bool = False
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    exclude_modules: list[str] | None = None
    mamba_ssm_cache_dtype: str | None = None

    def require_none(self) -> None:
        """ValueError if an algorithm is set."""
        for name in ("quant_algo", "kv_cache_quant_algo"):
            if (algorithm := getattr(self, name)) not in (None, QuantAlgo.NO_QUANT):
                raise ValueError(
                    f"LLM.quant_config.{name} = {shown_value(algorithm)} is not available in this release: leave it "
                    "out or use None or 'NO_QUANT'"
                )


class LlmArgs(StrictModel, owner="LLM"):
    """The arguments of ``LLM(...)``; sizes that ``build_config`` sets apply as if given directly.

    ``model``: a checkpoint's directory or file, or a hub name. ``tokenizer``: a transformers tokenizer, or the path or
    name of one; None for the model's. Sizes are upper bounds in sequences (``max_batch_size``) and tokens
    (``max_*_len``, ``max_num_tokens``); ``max_input_len`` is enforced only if set. ``stream_interval`` and
    ``max_stats_len`` count iterations. ``disable_overlap_scheduler`` makes the host wait for each step before it plans
    the next. ``enforce_eager`` compiles each program when a request first needs it, for a short start.
    ``chat_template``: a file or a Jinja text that replaces the model's template. ``allow_request_chat_template``:
    whether a call of ``chat`` may pass its own template. ``encode_only``: whether texts are only ever computed whole,
    for ``embed`` and ``encode``, without a KV cache; encoders and classifiers are so in any case.
    """

    # Either XLA does this by itself, or only TensorRT's and PyTorch's backends have it.
    _ignored: ClassVar = frozenset(
        {
            "allreduce_strategy",
            "attn_backend",
            "batching_type",
            "cuda_graph_config",
            "embedding_parallel_mode",
            "enable_autotuner",
            "enable_build_cache",
            "enable_cuda_graph",
            "enable_iter_perf_stats",
            "enable_layerwise_nvtx_marker",
            "enable_min_latency",
            "encoder_cuda_graph_config",
            "extended_runtime_perf_knob_config",
            "fast_build",
            "garbage_collection_gen0_threshold",
            "gpus_per_node",
            "prefill_capture_num_tokens",
            "prefill_cuda_graph_backend",
            "sampler_force_async_worker",
            "telemetry_config",
            "torch_compile_config",
            "use_fused_attention",
            "workspace",
        }
    )
    _unavailable: ClassVar = {
        "tokenizer_mode": ("auto",),
        "custom_tokenizer": (None,),
        "post_processor_hook": (None,),
        "model_kwargs": (None,),
        "generation_config": ("trtllm",),
        "pipeline_parallel_size": (1,),
        "context_parallel_size": (1,),
        "moe_cluster_parallel_size": (None, 1),
        "moe_tensor_parallel_size": (None, 1),
        "moe_expert_parallel_size": (None, 1),
        "moe_config": (None,),
        "enable_attention_dp": (False,),
        "attention_dp_config": (None,),
        "enable_lm_head_tp_in_adp": (False,),
        "pp_partition": (None,),
        "cp_config": (None,),
        "dwdp_config": (None,),
        "quant_config": (None,),
        "calib_config": (None,),
        "force_dynamic_quantization": (False,),
        "nvfp4_gemm_config": (None,),
        "speculative_config": (None,),
        "speculative_decoding_config": (None,),
        "decoding_config": (None,),
        "enable_lora": (False,),
        "lora_config": (None,),
        "peft_cache_config": (None,),
        "guided_decoding_backend": (None, "llguidance"),
        "normalize_log_probs": (False,),
        "weight_streaming": (False,),
        "multimodal_encoder": (None,),
        "multimodal_config": (None,),
        "mm_encoder_only": (False,),
        "disable_mm_encoder": (False,),
        "encoder_max_batch_size": (None,),
        "encoder_max_num_tokens": (None,),
        "cache_transceiver_config": (None,),
        "kv_connector_config": (None,),
        "kv_cache_compression_config": (None,),
        "sparse_attention_config": (None,),
        "checkpoint_loader": (None,),
        "checkpoint_format": (None, "HF"),
        "checkpoint_io_policy": ("auto",),
        "num_postprocess_workers": (0,),
        "postprocess_tokenizer_dir": (None,),
        "num_serve_frontends": (1,),
        "reasoning_parser": (None,),
        "enable_iter_req_stats": (False,),
        "print_iter_log": (False,),
        "return_perf_metrics": (False,),
        "perf_metrics_output_dir": (None,),
        "perf_metrics_max_requests": (0,),
        "prometheus_metrics_config": (None,),
        "enable_energy_metrics": (False,),
        "otlp_traces_endpoint": (None,),
        "batch_wait_timeout_ms": (0,),
        "batch_wait_timeout_iters": (0,),
        "batch_wait_max_tokens_ratio": (0,),
        "mpi_session": (None,),
        "orchestrator_type": (None,),
        "env_overrides": (None,),
        "ray_worker_extension_cls": (None,),
        "ray_placement_config": (None,),
        "sleep_config": (None,),
    }

    model: str | Path
    tokenizer: Any = None
    tokenizer_mode: Literal["auto", "slow"] = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    chat_template: str | Path | None = None
    batched_logits_processor: Callable[..., object] | None = None
    gather_generation_logits: bool = False
    allow_request_chat_template: bool = False
    revision: str | None = None
    tokenizer_revision: str | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: DType = "auto"
    backend: Literal["jax", "xla", "tensorrt", "pytorch"] | None = None
    tensor_parallel_size: Size = 1

    build_config: BuildConfig | None = None
    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)
    scheduler_config: SchedulerConfig = Field(default_factory=SchedulerConfig)
    max_batch_size: BatchSize = 2048
    max_input_len: Size | None = None
    max_seq_len: Size | None = None
    max_beam_width: Size = 1
    max_num_tokens: StepTokens = 8192
    enable_chunked_prefill: bool = False
    disable_overlap_scheduler: bool = False
    encode_only: bool = False
    enforce_eager: bool = False

    stream_interval: Size = 1
    iter_stats_max_iterations: Length | None = None
    request_stats_max_iterations: Length | None = None
    max_stats_len: Size = 1000

    @classmethod
    def _prepare(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if isinstance(quant := arguments.get("quant_config"), QuantConfig):
            quant.require_none()
            arguments = arguments | {"quant_config": None}
        # As in TensorRT-LLM, None stands for the default of fields that do not accept None.
        given = {name: value for name, value in arguments.items() if value is not None}
        unknown = arguments.keys() - cls.model_fields.keys()
        build = given.get("build_config")
        if isinstance(build, Mapping):
            build = given["build_config"] = BuildConfig(**build)
        if isinstance(build, BuildConfig):
            for name in build.model_fields_set & cls.model_fields.keys():
                refuse_two_values(f"LLM.{name}", given.get(name), f"BuildConfig.{name}", getattr(build, name))
                given.setdefault(name, getattr(build, name))
        return given | {name: arguments[name] for name in unknown}

    @model_validator(mode="after")
    def _prompt_fits_sequence(self) -> Self:
        if self.max_input_len is not None and self.max_seq_len is not None and self.max_input_len > self.max_seq_len:
            raise ValueError(
                f"LLM.max_input_len = {self.max_input_len} exceeds max_seq_len = {self.max_seq_len}, which counts "
                "prompt and answer together: lower max_input_len or raise max_seq_len"
            )
        return self


FOR_GENERATION = (
    "kv_cache_config",
    "scheduler_config",
    "batched_logits_processor",
    "gather_generation_logits",
    "max_beam_width",
    "enable_chunked_prefill",
    "stream_interval",
    "chat_template",
    "allow_request_chat_template",
)
"""Arguments that nothing reads where texts are computed whole: there is no KV cache, and no token is drawn."""


def warn_of_unread(args: LlmArgs) -> None:
    """Warn by name of the arguments that were given and mean nothing to a model that computes texts whole.

    One that was given with its default value is no mistake, so nothing is said of it.
    """
    for name in FOR_GENERATION:
        value = getattr(args, name)
        if name in args.model_fields_set and value != LlmArgs.model_fields[name].get_default(call_default_factory=True):
            logger.warning(
                "LLM.%s = %s has no effect: this model computes texts whole, without a KV cache, and generates none; "
                "leave it out",
                name, shown_value(value),
            )  # fmt: skip


def parse_llm_args(**arguments: Any) -> LlmArgs:
    """The validated arguments of ``LLM(**arguments)``. ValueError names each invalid one, its value and the remedy."""
    args = LlmArgs(**arguments)
    if args.trust_remote_code:
        logger.warning(
            "trust_remote_code=True is accepted for compatibility: code from a checkpoint is never run, and a model "
            "that needs it cannot be loaded"
        )
    return args
