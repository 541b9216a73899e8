"""The names that TensorRT-LLM users import from `tensorrt_llm.sampling_params`."""

from trtllm_jax.requests.logits_processors import BatchedLogitsProcessor, LogitsProcessor
from trtllm_jax.requests.sampling_params import SamplingParams
from trtllm_jax.structured.params import GuidedDecodingParams

__all__ = ["BatchedLogitsProcessor", "GuidedDecodingParams", "LogitsProcessor", "SamplingParams"]
