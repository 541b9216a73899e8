"""The names that TensorRT-LLM users import from `tensorrt_llm.llmapi`."""

from trtllm_jax.executor import LoRARequest
from trtllm_jax.guided_decoding import GuidedDecodingParams
from trtllm_jax.llm import LLM
from trtllm_jax.llm_args import (
    BuildConfig,
    CapacitySchedulerPolicy,
    ContextChunkingPolicy,
    KvCacheConfig,
    LlmArgs,
    QuantAlgo,
    QuantConfig,
    SchedulerConfig,
)
from trtllm_jax.outputs import CompletionOutput, Logprob, RequestOutput
from trtllm_jax.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "BuildConfig",
    "CapacitySchedulerPolicy",
    "CompletionOutput",
    "ContextChunkingPolicy",
    "GuidedDecodingParams",
    "KvCacheConfig",
    "LlmArgs",
    "LoRARequest",
    "Logprob",
    "QuantAlgo",
    "QuantConfig",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
]
