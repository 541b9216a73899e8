"""Loads the weights of an opened checkpoint onto the devices."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from checkpoints.dummy import dummy_params
from checkpoints.load import load_params
from checkpoints.table import param_shapes
from pallas_kernels.devices import Platform
from sharding import ShardingRules
from trtllm_jax.engine import device_memory
from trtllm_jax.functional.model import Model
from trtllm_jax.logger import progress
from trtllm_jax.models import unread_tensors


def resolve_dtype(dtype: str, config: dict[str, Any], platform: Platform) -> jnp.dtype:
    """The dtype of the weights: `dtype`, or for "auto" the checkpoint's, as far as the platform supports it.

    A checkpoint that names no dtype (GGUF) counts as bfloat16. On a CPU "auto" is float32 if the checkpoint's dtype is
    float32 or the CPU has no bfloat16 instructions, else bfloat16; it is never float16.
    """
    if dtype != "auto":
        return jnp.dtype(dtype)
    text_config = config.get("text_config")
    of_text = text_config.get("dtype") if isinstance(text_config, dict) else None
    stated = config.get("dtype") or config.get("torch_dtype") or of_text or "bfloat16"
    stored = jnp.dtype(stated if stated in ("float32", "bfloat16", "float16") else "bfloat16")
    if not platform.on_cpu or stored == jnp.float32:
        return stored
    return jnp.dtype(jnp.bfloat16 if _cpu_has_bfloat16() else jnp.float32)


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def load_weights(model: Model, mesh: Mesh, *, dtype: str, load_format: str) -> Any:
    """The weights of a model's checkpoint, placed on `mesh` by the default sharding rules.

    `dtype` is as for `resolve_dtype`; `load_format` "dummy" gives random weights. MemoryError if they do not fit.
    """
    checkpoint, table = model.files, model.module.table(model.config)
    rules = ShardingRules(mesh)
    where: dict[str, Any] = {
        "extents": rules.extents(model.config.sizes),
        "rules": rules,
        "dtype": resolve_dtype(dtype, checkpoint.config, Platform.of(mesh)),
    }
    device_memory.check_weights(param_shapes(table, **where), mesh)
    with progress(None, "Loading weights", unit="B", unit_scale=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if load_format == "dummy":
            return dummy_params(table, progress=show, **where)
        ignore = unread_tensors(model.module, checkpoint.config)
        with checkpoint.named_in_errors():
            return load_params(table, checkpoint.tensors, progress=show, ignore=ignore, **where)
