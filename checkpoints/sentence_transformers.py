"""What sentence-transformers keeps beside a model: how embeddings are pooled, and what a cross-encoder's scores are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.error_text import short_repr
from checkpoints.json_file import read_object, read_value

_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_READ = ("Transformer", "Pooling", "Normalize")


class StatedPooling(NamedTuple):
    """What modules.json and the pooling module's config.json state.

    Attributes:
        how: "cls", "mean" or "last".
        normalize: whether embeddings are divided by their L2 norm.
    """

    how: str
    normalize: bool


def stated_pooling(folder: Path) -> StatedPooling | None:
    """How the model in `folder` makes embeddings; None where no modules.json is there.

    ValueError names a module or a kind of pooling that is not read.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    modules = read_value(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ValueError(f"{path} holds {short_repr(modules)}; it must be a list of objects")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    for kind in kinds:
        if kind not in _READ:
            raise ValueError(f"{path} names a module of type {short_repr(kind)}; read here: {', '.join(_READ)}")
    pooling = next((module for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"), None)
    if pooling is None:
        raise ValueError(f"{path} names no Pooling module, so it is unknown how embeddings are made")
    return StatedPooling(_how(folder, pooling), "Normalize" in kinds)


def _how(folder: Path, module: Mapping[str, Any]) -> str:
    name = str(module.get("path", ""))
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{folder / 'modules.json'} has the path {short_repr(name)}; it must be a folder beside it")
    path = folder / name / "config.json"
    config = read_object(path)
    if "pooling_mode" in config:  # since sentence-transformers 5
        found = [str(config["pooling_mode"])]
        known = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
    else:
        found = [field for field, on in config.items() if field.startswith("pooling_mode_") and on is True]
        known = _MODES
    if len(found) != 1 or found[0] not in known:
        raise ValueError(f"{path} asks for {short_repr(found)}; read here is one of {', '.join(known)}")
    return known[found[0]]


def score_activation(config: Mapping[str, Any], labels: int) -> str:
    """What makes a cross-encoder's logit a score, "sigmoid" or "identity"; the first for one class, unless stated."""
    return stated_activation(config) or ("sigmoid" if labels == 1 else "identity")


def stated_activation(config: Mapping[str, Any]) -> str | None:
    """The "sigmoid" or "identity" that sentence-transformers wrote into config.json; None if it wrote neither."""
    of_library = config.get("sentence_transformers")
    stated = of_library.get("activation_fn") if isinstance(of_library, Mapping) else None
    stated = stated or config.get("sbert_ce_default_activation_function")
    if stated is None:
        return None
    known = {"Sigmoid": "sigmoid", "Identity": "identity"}
    name = str(stated).rpartition(".")[2]
    if name not in known:
        raise ValueError(f"config.json has {short_repr(stated)} make scores of logits; read here: {', '.join(known)}")
    return known[name]
