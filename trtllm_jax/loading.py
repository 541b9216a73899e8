"""From the name of a model to weights on the devices and a tokenizer: what comes before an engine, or does without."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import sharding
from checkpoints.checkpoint import Checkpoint, open_checkpoint
from checkpoints.load import dummy_params, ignorable, load_params
from checkpoints.table import param_shapes
from trtllm_jax import device_memory
from trtllm_jax.engine.steps import Model
from trtllm_jax.llm_args import LlmArgs
from trtllm_jax.logger import progress
from trtllm_jax.models import architecture
from trtllm_jax.tokenizer import Tokenizer
from trtllm_jax.tokenizer_loading import load_tokenizer, stated_end_ids


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for an engine.

    Attributes:
        model: its pure functions.
        params: its weights on the mesh.
        mesh: the devices.
        tokenizer: None if none was wanted.
        end_ids: every id of the model that ends a sequence, by the generation config and the tokenizer.
        model_type: the configuration's name of the architecture; "" where it has none.
    """

    model: Model
    params: Any
    mesh: Mesh
    tokenizer: Tokenizer | None
    end_ids: frozenset[int]
    model_type: str


def load(args: LlmArgs) -> LoadedModel:
    """Everything `args` names, read and placed; configuration and lengths are checked before any weight is read."""
    checkpoint = open_checkpoint(args.model, revision=args.revision)
    module = architecture(checkpoint.config)
    model = Model(module, module.Config.from_hf(checkpoint.config))
    if args.max_seq_len is not None and args.max_seq_len > model.config.max_position:
        raise ValueError(
            f"LLM.max_seq_len = {args.max_seq_len} exceeds the {model.config.max_position} positions of the model: use "
            "at most these, or leave it out"
        )
    mesh = sharding.make_mesh(args.tensor_parallel_size)
    tokenizer = load_tokenizer(args, checkpoint)
    ends = stated_end_ids(checkpoint) | frozenset(tokenizer.eos_ids if tokenizer else ())
    return LoadedModel(
        model=model,
        params=load_weights(checkpoint, module, model.config, mesh, dtype=args.dtype, load_format=args.load_format),
        mesh=mesh,
        tokenizer=tokenizer,
        # Others, which an embedding without their rows never draws, could not be forbidden either.
        end_ids=frozenset(token for token in ends if token < model.config.vocab),
        model_type=str(checkpoint.config.get("model_type") or ""),
    )


def resolve_dtype(dtype: str, config: dict[str, Any]) -> jnp.dtype:
    """The dtype of the weights: what was asked for, or what suits the checkpoint and the device.

    "auto" is the checkpoint's own, bfloat16 where it names none (GGUF). A CPU computes in bfloat16 only where its
    instructions know it, and never in float16: there it is float32.
    """
    if dtype != "auto":
        return jnp.dtype(dtype)
    text_config = config.get("text_config")
    of_text = text_config.get("dtype") if isinstance(text_config, dict) else None
    stated = config.get("dtype") or config.get("torch_dtype") or of_text or "bfloat16"
    stored = jnp.dtype(stated if stated in ("float32", "bfloat16", "float16") else "bfloat16")
    if jax.default_backend() != "cpu" or stored == jnp.float32:
        return stored
    return jnp.dtype(jnp.bfloat16 if _cpu_has_bfloat16() else jnp.float32)


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def load_weights(
    checkpoint: Checkpoint, module: ModuleType, config: Any, mesh: Mesh, *, dtype: str, load_format: str
) -> Any:
    """The weights of an architecture's `module` and `config`, placed on `mesh` by the table in `sharding.rules`.

    `dtype` as `resolve_dtype` takes it; `load_format` "dummy" draws them at random. MemoryError where they do not fit.
    """
    sizes = config.sizes
    table = module.table(config)
    where: dict[str, Any] = {
        "sizes": sizes,
        "padded": sharding.pad_sizes(sizes, mesh),
        "mesh": mesh,
        "spec_of": sharding.spec_of,
        "dtype": resolve_dtype(dtype, checkpoint.config),
    }
    device_memory.check_weights(param_shapes(table, **where), where["mesh"])
    with progress(None, "Loading weights", unit="B", unit_scale=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if load_format == "dummy":
            return dummy_params(table, progress=show, **where)
        return load_params(table, checkpoint.tensors, progress=show, ignore=ignorable(checkpoint.config), **where)
