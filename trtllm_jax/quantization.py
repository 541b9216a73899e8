"""The names that TensorRT-LLM users import from `tensorrt_llm.quantization`."""

from trtllm_jax.llmapi.llm_args import QuantAlgo, QuantConfig

__all__ = ["QuantAlgo", "QuantConfig"]
