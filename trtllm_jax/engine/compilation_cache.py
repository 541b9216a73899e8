"""Compiled programs kept between runs, in the user's cache folder, unless the user chose a place already.

A process has one cache, which `jax.config` names. It is ours only while an engine is made: a user's own programs are
kept where, and if, the user says so.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from trtllm_jax.logger import logger

ABANDONED_SECONDS = 3600
"""Age from which a file that was never finished belongs to a process that was killed."""

_lock = threading.Lock()
_holders = 0
_changed: dict[str, tuple[Any, Any]] = {}
"""What `jax.config` had, and has, while the cache is ours."""


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Programs that are compiled meanwhile are read from the cache and written to it, in any thread.

    The folder is $XDG_CACHE_HOME/trtllm_jax (~/.cache by default), or the one that JAX_COMPILATION_CACHE_DIR or
    `jax.config` named before. An entry is there whole or not at all, one that cannot be read is replaced, and a folder
    that cannot be written is a warning. Afterwards `jax.config` is as it was.
    """
    global _holders
    with _lock:
        if _holders == 0:
            _begin()
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                _end()


def folder() -> Path | None:
    """Where programs are kept, whether or not the folder is there yet; None where it is no folder of this machine."""
    named = getattr(jax.config, "jax_compilation_cache_dir", None)
    if named is None:
        return _own_folder()
    return None if "://" in named else Path(named)


def _own_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtllm_jax" / "xla"


def _begin() -> None:
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        folder = _own_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _warn(folder, error)
            return
        _change("jax_compilation_cache_dir", str(folder))
        # An engine has dozens of programs; most of a small model's would fall below JAX's one-second threshold.
        _change("jax_persistent_cache_min_compile_time_secs", 0.0)
    _reset()
    _wrap()


def _end() -> None:
    for name, (before, ours) in _changed.items():
        if getattr(jax.config, name) == ours:
            jax.config.update(name, before)
    _changed.clear()
    _reset()


def _change(name: str, value: Any) -> None:
    _changed[name] = (getattr(jax.config, name), value)
    jax.config.update(name, value)


def _reset() -> None:
    """JAX's `reset_cache`, but whole under JAX's lock.

    JAX's own clears the cache first and then takes the lock: a thread that opens the cache between, because it compiles
    something, leaves JAX with a cache that it takes for unopened, and the next thread fails.
    """
    # Up to jax 0.12 the public module has neither the lock nor what it guards.
    try:
        from jax._src import compilation_cache

        jax_cache: Any = compilation_cache
        with jax_cache._cache_initialized_mutex:
            jax_cache._cache = None
            jax_cache._cache_initialized = jax_cache._cache_checked = jax_cache._cache_used = False
    except (ImportError, AttributeError) as error:
        logger.debug("JAX's compilation cache is reset by its own function: %r", error)
        reset_cache()


def _wrap() -> None:
    """Put `_WholeEntries` before JAX's cache; where that fails, the cache works as ever."""
    # Up to jax 0.12 the public module, jax.experimental.compilation_cache, names a folder and closes the cache; only
    # the private one has the object whose entries are read and written.
    try:
        from jax._src import compilation_cache

        jax_cache: Any = compilation_cache
        jax_cache._initialize_cache()
        inner = jax_cache._cache
        # With a bound on its size JAX takes a lock for what it writes and removes.
        if inner is not None and not inner.eviction_enabled and "://" not in str(inner._path):
            jax_cache._cache = _WholeEntries(inner, jax_cache.decompress_executable)
    except (ImportError, AttributeError, OSError) as error:
        logger.debug("JAX's compilation cache is used as it is: %r", error)


class _WholeEntries:
    """JAX's cache over a folder, which as such leaves a file cut short where the disk is full and never replaces it.

    Args:
        inner: JAX's own, which knows the names of files.
        decompress: raises where an entry is not whole. JAX does this again, which is little beside compiling.
    """

    def __init__(self, inner: Any, decompress: Any) -> None:
        self._inner = inner
        self._decompress = decompress
        self._path = Path(inner._path)
        self._failed = False
        for left in self._path.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    left.unlink()

    def get(self, key: str) -> bytes | None:
        """The entry; None where there is none that can be read."""
        try:
            value: bytes | None = self._inner.get(key)
            if value is not None:
                self._decompress(value)
        except Exception as error:  # of the disk, or of any compression that this Python has
            logger.debug("%s: the entry of %s cannot be read and is made anew: %r", self._path, key, error)
            return None
        return value

    def put(self, key: str, value: bytes) -> None:
        """Write an entry, in place of one that could not be read."""
        unfinished = self._path / f".{key}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            unfinished.write_bytes(value)
            unfinished.replace(self._path / f"{key}-cache")
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            if not self._failed:
                self._failed = True
                _warn(self._path, error)


def _warn(folder: Path, error: OSError) -> None:
    logger.warning(
        "Compiled programs cannot be kept in %s, so that the next start compiles them again: %s. Make room there, or "
        "name another folder by XDG_CACHE_HOME",
        folder,
        error,
    )
