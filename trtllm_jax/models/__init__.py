"""Architectures, one file each, found by the name that config.json gives; adding one changes no other file."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from checkpoints.checkpoint import Checkpoint
from checkpoints.error_text import short_repr
from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.load import ignorable
from trtllm_jax.nn.config_fields import require


def architecture(config: Mapping[str, Any]) -> ModuleType:
    """The module that implements `config["architectures"][0]`; ValueError lists what is supported.

    ValueError too where the weights are quantised: nothing here reads them.
    """
    if config.get("quantization_config"):
        raise ValueError(
            f"config.json has quantization_config={short_repr(config['quantization_config'])}; quantised weights are "
            "read from GGUF files only: give a checkpoint in bfloat16, float16 or float32"
        )
    wanted = _stated_name(config)
    for module in _modules():
        if wanted in module.ARCHITECTURES:
            return module
    raise ValueError(
        f"architectures names {short_repr(wanted)}, which is not supported; supported: {', '.join(sorted(supported()))}"
    )


def read_architecture(checkpoint: Checkpoint) -> tuple[ModuleType, Any]:
    """The module that implements a checkpoint's architecture, and its `Config`.

    ValueError names the folder or file, and what of its configuration is missing, makes no sense or is not supported.
    """
    with checkpoint.named_in_errors():
        return _configured(checkpoint.config)


def unread_tensors(module: ModuleType, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors that a checkpoint of an architecture and this config.json may hold although nothing reads them."""
    head = ("lm_head.*",) if _full_name(config) else ()  # which no bare decoder reads
    return ignorable(config, (*getattr(module, "IGNORED", ()), *head))


def _configured(config: Mapping[str, Any]) -> tuple[ModuleType, Any]:
    """The module that implements a config.json, and the `Config` that it reads from it; ValueErrors are those of both.

    The bare name of a decoder, such as "MistralModel" or "Gemma3TextModel", stands for its hidden states: there is no
    head in the checkpoint.
    """
    full_name = _full_name(config)
    named = config if full_name is None else {**config, "architectures": [full_name]}
    module = architecture(named)
    found = module.Config.from_hf(named)
    if module.cache_spec(found):
        # transformers makes any decoder an encoder where this is false; ours attend to what is before a token.
        for stated in (config, config.get("text_config")):
            require(stated if isinstance(stated, dict) else {}, is_causal=(None, True))
    return module, found if full_name is None else replace(found, bare=True)


def _full_name(config: Mapping[str, Any]) -> str | None:
    """The name with logits of a decoder whose bare name is stated; None for any other, and for one that sees."""
    wanted, known = _stated_name(config), supported()
    if not isinstance(wanted, str) or wanted in known or not wanted.endswith("Model") or "text_config" in config:
        return None
    base = wanted.removesuffix("Model").removesuffix("Text")
    return next((name for name in (f"{base}ForCausalLM", f"{base}LMHeadModel") if name in known), None)


def _stated_name(config: Mapping[str, Any]) -> Any:
    """The first name in `architectures`, or the one that it is; None if there is none."""
    stated = config.get("architectures")
    return stated[0] if isinstance(stated, list) and stated else stated or None


def supported() -> dict[str, str]:
    """Every supported name in config.json's `architectures`, with the models that have it."""
    return {name: (module.__doc__ or "").partition("\n")[0] for module in _modules() for name in module.ARCHITECTURES}


def gguf_architectures() -> tuple[GgufArchitecture, ...]:
    """The architectures that are read from GGUF files, for `checkpoints.checkpoint.open_checkpoint`."""
    return tuple(known for module in _modules() for known in getattr(module, "GGUF", ()))


def _modules() -> Iterator[ModuleType]:
    for found in pkgutil.iter_modules(__path__):
        yield importlib.import_module(f"{__name__}.{found.name}")
