"""The names that TensorRT-LLM users import from `tensorrt_llm.llmapi`."""

from typing import TYPE_CHECKING

from trtllm_jax.common.lazy import lazy_names

if TYPE_CHECKING:
    from trtllm_jax.executor import LoRARequest as LoRARequest
    from trtllm_jax.llmapi.llm import LLM as LLM
    from trtllm_jax.llmapi.llm_args import BuildConfig as BuildConfig
    from trtllm_jax.llmapi.llm_args import CapacitySchedulerPolicy as CapacitySchedulerPolicy
    from trtllm_jax.llmapi.llm_args import ContextChunkingPolicy as ContextChunkingPolicy
    from trtllm_jax.llmapi.llm_args import KvCacheConfig as KvCacheConfig
    from trtllm_jax.llmapi.llm_args import LlmArgs as LlmArgs
    from trtllm_jax.llmapi.llm_args import QuantAlgo as QuantAlgo
    from trtllm_jax.llmapi.llm_args import QuantConfig as QuantConfig
    from trtllm_jax.llmapi.llm_args import SchedulerConfig as SchedulerConfig
    from trtllm_jax.requests.outputs import CompletionOutput as CompletionOutput
    from trtllm_jax.requests.outputs import EncoderOutput as EncoderOutput
    from trtllm_jax.requests.outputs import Logprob as Logprob
    from trtllm_jax.requests.outputs import RequestOutput as RequestOutput
    from trtllm_jax.requests.sampling_params import SamplingParams as SamplingParams
    from trtllm_jax.structured.params import GuidedDecodingParams as GuidedDecodingParams

_MODULE_OF = {
    "LoRARequest": "trtllm_jax.executor",
    "LLM": "trtllm_jax.llmapi.llm",
    "BuildConfig": "trtllm_jax.llmapi.llm_args",
    "CapacitySchedulerPolicy": "trtllm_jax.llmapi.llm_args",
    "ContextChunkingPolicy": "trtllm_jax.llmapi.llm_args",
    "KvCacheConfig": "trtllm_jax.llmapi.llm_args",
    "LlmArgs": "trtllm_jax.llmapi.llm_args",
    "QuantAlgo": "trtllm_jax.llmapi.llm_args",
    "QuantConfig": "trtllm_jax.llmapi.llm_args",
    "SchedulerConfig": "trtllm_jax.llmapi.llm_args",
    "CompletionOutput": "trtllm_jax.requests.outputs",
    "EncoderOutput": "trtllm_jax.requests.outputs",
    "Logprob": "trtllm_jax.requests.outputs",
    "RequestOutput": "trtllm_jax.requests.outputs",
    "SamplingParams": "trtllm_jax.requests.sampling_params",
    "GuidedDecodingParams": "trtllm_jax.structured.params",
}

__all__ = [*_MODULE_OF]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
