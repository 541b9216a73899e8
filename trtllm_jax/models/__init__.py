"""Architectures, one file each, found by the name that config.json gives; adding one changes no other file."""

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from checkpoints.shown import shown


def architecture(config: Mapping[str, Any]) -> ModuleType:
    """The module that implements `config["architectures"][0]`; ValueError lists what is supported."""
    stated = config.get("architectures")
    wanted = stated[0] if isinstance(stated, list) and stated else stated or None
    supported: list[str] = []
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        if wanted in module.ARCHITECTURES:
            return module
        supported.extend(module.ARCHITECTURES)
    raise ValueError(
        f"architectures names {shown(wanted)}, which is not supported; supported: {', '.join(sorted(supported))}"
    )
