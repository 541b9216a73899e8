"""The manual's configuration works as written; everything else that is wrong says field, value and remedy."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trtllm_jax.executor import LoRARequest
from trtllm_jax.llmapi.llm_args import (
    BuildConfig,
    CapacitySchedulerPolicy,
    ContextChunkingPolicy,
    KvCacheConfig,
    LlmArgs,
    SchedulerConfig,
    parse_llm_args,
)
from trtllm_jax.quantization import QuantAlgo, QuantConfig


def message(**arguments: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - every caller checks the text
        parse_llm_args(**{"model": "m"} | arguments)
    return str(error.value)


def test_defaults() -> None:
    args = parse_llm_args(model="m")
    assert (args.max_batch_size, args.max_num_tokens, args.max_beam_width) == (2048, 8192, 1)
    assert (args.max_input_len, args.max_seq_len) == (None, None)
    assert (args.tensor_parallel_size, args.dtype, args.load_format, args.backend) == (1, "auto", "auto", None)
    assert (args.stream_interval, args.max_stats_len, args.disable_overlap_scheduler) == (1, 1000, False)
    assert args.kv_cache_config == KvCacheConfig()
    assert args.scheduler_config == SchedulerConfig()


def test_tensorrt_llms_defaults_of_the_nested_records() -> None:
    build, cache, scheduler = BuildConfig(), KvCacheConfig(), SchedulerConfig()
    assert (build.max_input_len, build.max_seq_len, build.max_batch_size) == (1024, None, 2048)
    assert (build.max_beam_width, build.max_num_tokens, build.opt_batch_size) == (1, 8192, 8)
    assert (build.strongly_typed, build.use_refit) == (True, False)
    assert (cache.enable_block_reuse, cache.max_tokens, cache.free_gpu_memory_fraction) == (True, None, 0.9)
    assert (cache.tokens_per_block, cache.dtype, cache.event_buffer_max_size) == (32, "auto", 0)
    assert (cache.enable_partial_reuse, cache.copy_on_partial_reuse) == (True, True)
    assert scheduler.capacity_scheduler_policy is CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    assert scheduler.context_chunking_policy is None


def test_the_manuals_configuration() -> None:
    build = BuildConfig(max_batch_size=8, max_input_len=256, max_seq_len=512, max_beam_width=4)
    cache = KvCacheConfig(free_gpu_memory_fraction=0.9, enable_block_reuse=True)
    args = parse_llm_args(model="llama", tensor_parallel_size=2, build_config=build, kv_cache_config=cache)
    assert (args.max_batch_size, args.max_input_len, args.max_seq_len, args.max_beam_width) == (8, 256, 512, 4)
    assert (args.tensor_parallel_size, args.max_num_tokens) == (2, 8192)


def test_the_manuals_production_service(caplog: pytest.LogCaptureFixture) -> None:
    build = BuildConfig(
        max_batch_size=16,
        max_input_len=2048,
        max_seq_len=4096,
        max_beam_width=1,
        strongly_typed=True,
        use_refit=True,
        weight_streaming=False,
    )
    cache = KvCacheConfig(free_gpu_memory_fraction=0.85, enable_block_reuse=True, max_tokens_in_paged_kv_cache=None)
    args = parse_llm_args(
        model=Path("llama"),
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        build_config=build,
        kv_cache_config=cache,
        quant_config=None,
        trust_remote_code=True,
    )
    assert args.model == Path("llama")
    assert args.kv_cache_config.max_tokens is None
    assert "code from a checkpoint is never run" in caplog.text


def test_only_trusting_remote_code_warns(caplog: pytest.LogCaptureFixture) -> None:
    parse_llm_args(model="m", trust_remote_code=False)
    assert caplog.text == ""


def test_a_build_config_that_sets_no_size_changes_none() -> None:
    assert parse_llm_args(model="m", build_config=BuildConfig(use_refit=True)).max_input_len is None


def test_a_size_set_later_on_the_build_config_counts() -> None:
    build = BuildConfig()
    build.max_input_len = 1024
    assert parse_llm_args(model="m", build_config=build).max_input_len == 1024


def test_sizes_given_twice_must_agree() -> None:
    build = BuildConfig(max_batch_size=8)
    assert parse_llm_args(model="m", build_config=build, max_batch_size=8).max_batch_size == 8
    assert message(build_config=build, max_batch_size=9) == (
        "LLM.max_batch_size = 9 and BuildConfig.max_batch_size = 8 disagree: give one of them"
    )
    assert "disagree" in message(build_config={"max_num_tokens": 64}, max_num_tokens=65)


def test_nested_records_may_be_dicts() -> None:
    args = parse_llm_args(
        model="m",
        build_config={"max_batch_size": 4},
        kv_cache_config={"tokens_per_block": 64, "dtype": "float16"},
        scheduler_config={"capacity_scheduler_policy": "MAX_UTILIZATION"},
    )
    assert args.build_config == BuildConfig(max_batch_size=4)
    assert args.max_batch_size == 4
    assert args.kv_cache_config == KvCacheConfig(tokens_per_block=64, dtype="float16")
    assert args.scheduler_config.capacity_scheduler_policy is CapacitySchedulerPolicy.MAX_UTILIZATION


def test_none_restores_the_default() -> None:
    args = parse_llm_args(model="m", max_num_tokens=None, kv_cache_config=None, build_config=None, dtype=None)
    assert args == LlmArgs(model="m")


@pytest.mark.parametrize(
    ("arguments", "start", "remedy"),
    [
        ({"model": None}, "LLM.model is missing", "pass model=..."),
        ({"model": 3}, "LLM.model = 3 is invalid", "valid string or an instance of Path"),
        ({"tensor_parallel_size": 0}, "LLM.tensor_parallel_size = 0 is invalid", "greater than or equal to 1"),
        ({"max_batch_size": True}, "LLM.max_batch_size = True is invalid", "valid integer"),
        ({"max_seq_len": "4096"}, "LLM.max_seq_len = '4096' is invalid", "valid integer"),
        ({"dtype": "fp8"}, "LLM.dtype = 'fp8' is invalid", "'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"backend": "vllm"}, "LLM.backend = 'vllm' is invalid", "'jax', 'xla', 'tensorrt' or 'pytorch'"),
        ({"load_format": "pickle"}, "LLM.load_format = 'pickle' is invalid", "'auto' or 'dummy'"),
        ({"stream_interval": 0}, "LLM.stream_interval = 0 is invalid", "greater than or equal to 1"),
        ({"build_config": 3}, "LLM.build_config = 3 is invalid", "dictionary or instance of BuildConfig"),
        ({"max_input_len": 9, "max_seq_len": 8}, "LLM.max_input_len = 9 exceeds max_seq_len = 8", "raise max_seq_len"),
        ({"tensor_paralel_size": 2}, "LLM got invalid argument: tensor_paralel_size (= 2)", "tensor_parallel_size"),
        ({"zzz": 2}, "LLM got invalid argument: zzz (= 2)", "it takes "),
    ],
)
def test_errors_name_field_value_and_remedy(arguments: dict[str, Any], start: str, remedy: str) -> None:
    text = message(**arguments)
    assert text.startswith(start)
    assert remedy in text


@pytest.mark.parametrize(
    ("config", "arguments", "text"),
    [
        (KvCacheConfig, {"free_gpu_memory_fraction": 1.5}, "free_gpu_memory_fraction = 1.5 is invalid: it should"),
        (KvCacheConfig, {"free_gpu_memory_fraction": 0.0}, "free_gpu_memory_fraction = 0.0 is invalid: it should"),
        (KvCacheConfig, {"max_tokens": 0}, "max_tokens = 0 is invalid: it should be greater than or equal to 1"),
        (KvCacheConfig, {"tokens_per_block": 48}, "tokens_per_block = 48 is invalid: it should be a power of two"),
        (KvCacheConfig, {"dtype": "fp8"}, "dtype = 'fp8' is invalid: it should be 'auto', 'float32'"),
        (KvCacheConfig, {"host_cache_size": 1 << 30}, "host_cache_size = 1073741824 is not available in this release"),
        (BuildConfig, {"max_beam_width": 0}, "max_beam_width = 0 is invalid"),
        (BuildConfig, {"weight_streaming": True}, "weight_streaming = True is not available in this release"),
        (BuildConfig, {"strongly_typed": 1}, "strongly_typed = 1 is invalid: it should be a valid boolean"),
        (
            SchedulerConfig,
            {"capacity_scheduler_policy": CapacitySchedulerPolicy.STATIC_BATCH},
            "capacity_scheduler_policy = 'STATIC_BATCH' is not available in this release: "
            "leave it out or use 'GUARANTEED_NO_EVICT' or 'MAX_UTILIZATION'",
        ),
        (
            SchedulerConfig,
            {"context_chunking_policy": ContextChunkingPolicy.FORCE_CHUNK},
            "context_chunking_policy = 'FORCE_CHUNK' is not available",
        ),
    ],
)
def test_errors_of_nested_records(config: Any, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is checked below
        config(**arguments)
    assert str(error.value).startswith(f"{config.__name__}.{text}")


def test_an_error_inside_a_dict_names_the_inner_field() -> None:
    text = message(kv_cache_config={"tokens_per_block": 0})
    assert "LLM.kv_cache_config" in text
    assert "KvCacheConfig.tokens_per_block = 0 is invalid: it should be greater than or equal to 1" in text


def test_the_old_name_of_max_tokens() -> None:
    assert KvCacheConfig(max_tokens_in_paged_kv_cache=4096).max_tokens == 4096
    assert KvCacheConfig(max_tokens_in_paged_kv_cache=64, max_tokens=64).max_tokens == 64
    with pytest.raises(ValueError, match=r"max_tokens_in_paged_kv_cache = 64 and max_tokens = 65 disagree"):
        KvCacheConfig(max_tokens_in_paged_kv_cache=64, max_tokens=65)


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("pipeline_parallel_size", 2, 1),
        ("moe_expert_parallel_size", 4, None),
        ("quant_config", object(), None),
        ("speculative_decoding_config", object(), None),
        ("enable_lora", True, False),
        ("guided_decoding_backend", "xgrammar", None),
        ("weight_streaming", True, False),
        ("multimodal_encoder", object(), None),
        ("tokenizer_mode", "slow", "auto"),
        ("pipeline_parallel_size", True, 1),
    ],
)
def test_a_later_capability_is_refused_unless_neutral(name: str, value: Any, neutral: Any) -> None:
    text = message(**{name: value})
    assert text.startswith(f"LLM.{name} = ")
    assert f"is not available in this release: leave it out or use {neutral!r}" in text
    assert parse_llm_args(model="m", **{name: neutral}) == LlmArgs(model="m")


def test_what_xla_does_by_itself_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="trtllm_jax"):
        args = parse_llm_args(model="m", enable_cuda_graph=True, use_fused_attention=True, cuda_graph_config=None)
    assert args == LlmArgs(model="m")
    assert "LLM.enable_cuda_graph = True is accepted and has no effect here" in caplog.text


def test_a_refused_assignment_changes_nothing() -> None:
    config = KvCacheConfig(tokens_per_block=64)
    with pytest.raises(ValueError, match=r"KvCacheConfig\.tokens_per_block = 3 is invalid"):
        config.tokens_per_block = 3
    assert config == KvCacheConfig(tokens_per_block=64)


def test_configuration_loads_nothing_heavy() -> None:
    modules = ["llmapi.llm_args", "sampling_params", "text.tokenizer", "text.detokenizer", "logger"]
    script = f"import sys\nfor name in {modules}: __import__(f'trtllm_jax.{{name}}')\n" + (
        "print({'jax', 'torch', 'transformers', 'tokenizers', 'tqdm'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


@pytest.mark.parametrize("nothing", [{}, {"quant_algo": None}, {"quant_algo": QuantAlgo.NO_QUANT, "group_size": 64}])
def test_a_quantisation_that_asks_for_nothing_is_accepted(nothing: dict[str, Any]) -> None:
    assert LlmArgs(model="m", quant_config=QuantConfig(**nothing)) == LlmArgs(model="m")


@pytest.mark.parametrize("name", ["quant_algo", "kv_cache_quant_algo"])
def test_a_quantisation_is_refused_with_its_algorithm(name: str) -> None:
    for algorithm in ("INT8", QuantAlgo.INT8):
        with pytest.raises(ValueError, match=rf"LLM.quant_config.{name} = 'INT8' is not available in this release"):
            LlmArgs(model="m", quant_config=QuantConfig(**{name: algorithm}))
    with pytest.raises(ValueError, match=rf"QuantConfig.{name} = 'INT7' is invalid: it should be 'W8A16', "):
        QuantConfig(**{name: "INT7"})


def test_an_adapter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert LoRARequest("maths", 1, str(tmp_path)).lora_path == str(tmp_path)
    for missing in ("", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=rf"LoRARequest.lora_path = '{missing}' does not exist: give the adapter"):
            LoRARequest("maths", lora_path=missing)
