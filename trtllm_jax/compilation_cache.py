"""Compiled programs kept between runs, in the user's cache folder, unless the user chose a place already."""

import os
from pathlib import Path

import jax


def enable() -> None:
    """Turn on JAX's persistent compilation cache under $XDG_CACHE_HOME/trtllm_jax (~/.cache by default).

    A cache folder set before, by JAX_COMPILATION_CACHE_DIR or `jax.config`, is left as it is.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtllm_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # An engine has dozens of programs; most of a small model's would fall below JAX's one-second threshold.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
