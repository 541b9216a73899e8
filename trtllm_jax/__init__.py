"""TensorRT-LLM's LLM API on JAX and XLA: `from trtllm_jax import LLM`; and its models as pure functions.

Heavy modules are imported when a name is first used, so that importing the package stays quick.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_jax.common.lazy import lazy_names

if TYPE_CHECKING:
    from trtllm_jax.common.errors import EngineBusyError as EngineBusyError
    from trtllm_jax.common.errors import EngineDeadError as EngineDeadError
    from trtllm_jax.common.errors import RequestError as RequestError
    from trtllm_jax.functional.conversion import convert_checkpoint as convert_checkpoint
    from trtllm_jax.functional.generation import generate_fn as generate_fn
    from trtllm_jax.functional.research import load_model as load_model
    from trtllm_jax.llmapi.llm import LLM as LLM
    from trtllm_jax.llmapi.llm_args import BuildConfig as BuildConfig
    from trtllm_jax.llmapi.llm_args import KvCacheConfig as KvCacheConfig
    from trtllm_jax.llmapi.llm_args import SchedulerConfig as SchedulerConfig
    from trtllm_jax.requests.outputs import CompletionOutput as CompletionOutput
    from trtllm_jax.requests.outputs import EncoderOutput as EncoderOutput
    from trtllm_jax.requests.outputs import RequestOutput as RequestOutput
    from trtllm_jax.requests.sampling_params import SamplingParams as SamplingParams

__version__ = "0.1.0"

_MODULE_OF = {
    "LLM": "trtllm_jax.llmapi.llm",
    "BuildConfig": "trtllm_jax.llmapi.llm_args",
    "KvCacheConfig": "trtllm_jax.llmapi.llm_args",
    "SchedulerConfig": "trtllm_jax.llmapi.llm_args",
    "CompletionOutput": "trtllm_jax.requests.outputs",
    "EncoderOutput": "trtllm_jax.requests.outputs",
    "RequestOutput": "trtllm_jax.requests.outputs",
    "SamplingParams": "trtllm_jax.requests.sampling_params",
    "EngineBusyError": "trtllm_jax.common.errors",
    "EngineDeadError": "trtllm_jax.common.errors",
    "RequestError": "trtllm_jax.common.errors",
    "convert_checkpoint": "trtllm_jax.functional.conversion",
    "generate_fn": "trtllm_jax.functional.generation",
    "load_model": "trtllm_jax.functional.research",
}

__all__ = [*_MODULE_OF, "__version__"]


__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)


def _check_sibling_packages() -> None:
    """The lower rooms have generic names: say which file hides one instead of failing somewhere inside."""
    here = Path(__file__).parent.parent
    for name in ("pallas_kernels", "sharding", "checkpoints"):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None or Path(found.origin).parent.parent != here:
            where = found.origin if found else "nowhere"
            raise ImportError(
                f"trtllm_jax needs its own package {name!r} beside it in {here}, but Python finds {where}; "
                f"rename or move what hides it"
            )


_check_sibling_packages()
