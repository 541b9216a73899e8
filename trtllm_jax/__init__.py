"""TensorRT-LLM's LLM API on JAX and XLA: `from trtllm_jax import LLM`; and its models as pure functions.

Heavy modules are imported when a name is first used, so that importing the package stays quick.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm_jax.conversion import convert_checkpoint as convert_checkpoint
    from trtllm_jax.errors import EngineBusyError as EngineBusyError
    from trtllm_jax.errors import EngineDeadError as EngineDeadError
    from trtllm_jax.errors import RequestError as RequestError
    from trtllm_jax.generation import generate_fn as generate_fn
    from trtllm_jax.llm import LLM as LLM
    from trtllm_jax.llm_args import BuildConfig as BuildConfig
    from trtllm_jax.llm_args import KvCacheConfig as KvCacheConfig
    from trtllm_jax.llm_args import SchedulerConfig as SchedulerConfig
    from trtllm_jax.outputs import CompletionOutput as CompletionOutput
    from trtllm_jax.outputs import RequestOutput as RequestOutput
    from trtllm_jax.research import load_model as load_model
    from trtllm_jax.sampling_params import SamplingParams as SamplingParams

__version__ = "0.1.0"

_HOME_OF = {
    "LLM": "trtllm_jax.llm",
    "BuildConfig": "trtllm_jax.llm_args",
    "KvCacheConfig": "trtllm_jax.llm_args",
    "SchedulerConfig": "trtllm_jax.llm_args",
    "CompletionOutput": "trtllm_jax.outputs",
    "RequestOutput": "trtllm_jax.outputs",
    "SamplingParams": "trtllm_jax.sampling_params",
    "EngineBusyError": "trtllm_jax.errors",
    "EngineDeadError": "trtllm_jax.errors",
    "RequestError": "trtllm_jax.errors",
    "convert_checkpoint": "trtllm_jax.conversion",
    "generate_fn": "trtllm_jax.generation",
    "load_model": "trtllm_jax.research",
}

__all__ = [*_HOME_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


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
