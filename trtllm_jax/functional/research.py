"""`load_model`: a model's pure functions and its weights, without an engine."""

from pathlib import Path
from typing import Any, Literal, cast

from jax.sharding import AxisType, Mesh

from checkpoints.checkpoint import open_checkpoint
from checkpoints.sentence_transformers import stated_pooling
from sharding import make_mesh
from trtllm_jax.common.strict_model import DType, StrictModel
from trtllm_jax.functional.loading import load_weights
from trtllm_jax.functional.model import Model
from trtllm_jax.models import configured, gguf_architectures
from trtllm_jax.nn.pooling import How, Pooling
from trtllm_jax.text.tokenizer_loading import stated_end_ids


class LoadModelArgs(StrictModel, owner="load_model"):
    """The arguments of `load_model` that can be checked without the devices."""

    model: str | Path
    dtype: DType = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    revision: str | None = None
    attention: Literal["xla", "cudnn"] | None = None


def load_model(
    model: str | Path,
    *,
    dtype: DType = "auto",
    mesh: Mesh | None = None,
    load_format: Literal["auto", "dummy"] = "auto",
    revision: str | None = None,
    attention: Literal["xla", "cudnn"] | None = None,
) -> tuple[Model, Any]:
    """A model's pure functions and its weights, without an engine.

    The weights are a dict of arrays, with "layers" a tuple of dicts, as in `LLM.params`.

    Args:
        model: a folder with a Hugging Face checkpoint, a .gguf file, or the name of a model on the hub.
        dtype: of the weights; "auto" as for `LLM`.
        mesh: where to place the weights: heads, feed-forward channels and vocabulary are split over its axis "tp",
            padded if its size does not divide them; everything is replicated over its other axes. None for one device,
            from which `jax.device_put` can move them to any mesh.
        load_format: "dummy" for random weights.
        revision: of a model on the hub.
        attention: as `Model.attention`.

    Raises:
        ValueError: an argument or the checkpoint is invalid; the message names it, its value and the remedy.
        MemoryError: the weights do not fit on the devices.
    """
    args = LoadModelArgs(model=model, dtype=dtype, load_format=load_format, revision=revision, attention=attention)
    if mesh is not None and not _can_hold_weights(mesh):
        raise ValueError(
            f"load_model.mesh = {mesh} must be a Mesh with an axis named 'tp', and with automatic axes only: use "
            "jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names)), or leave mesh out "
            "and place the weights yourself"
        )
    found = open_model(args.model, revision=args.revision, attention=args.attention)
    return found, load_weights(found, mesh or make_mesh(), dtype=args.dtype, load_format=args.load_format)


def open_model(
    model: str | Path, *, revision: str | None = None, attention: Literal["xla", "cudnn"] | None = None
) -> Model:
    """A model's pure functions without weights, for example to call them with `LLM.params`.

    Arguments and errors as for `load_model`.
    """
    checkpoint = open_checkpoint(model, revision=revision, gguf_architectures=gguf_architectures())
    module, config = configured(checkpoint.config)
    encoder = not module.cache_spec(config)
    stated = stated_pooling(checkpoint.path) if checkpoint.path.is_dir() else None
    # Each of an encoder's hidden states depends on the whole text, of a decoder's only the last one.
    how = stated.how if stated else "mean" if encoder else "last"
    return Model(
        module,
        config,
        stated_end_ids(checkpoint),
        attention,
        checkpoint,
        pooling=Pooling(cast(How, how), stated.normalize if stated else True),
        encode_only=encoder or how != "last",
    )


def _can_hold_weights(mesh: object) -> bool:
    return isinstance(mesh, Mesh) and "tp" in mesh.shape and set(mesh.axis_types) == {AxisType.Auto}
