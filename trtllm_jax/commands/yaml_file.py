"""Reads the YAML file of --config."""

from pathlib import Path
from typing import Any

import click


def read_yaml(path: Path | None) -> dict[str, Any]:
    """The mapping in the file of --config; {} for None. click.UsageError if the file is invalid."""
    if path is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.UsageError(f"--config = {path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise click.UsageError(f"--config = {path} is not a mapping: write lines such as 'max_batch_size: 8'")
    if not isinstance(content.get("kv_cache_config") or {}, dict):
        raise click.UsageError(f"--config = {path}: kv_cache_config is not a mapping")
    return content
