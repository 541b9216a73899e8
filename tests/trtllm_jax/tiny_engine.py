"""An engine of the tiny Llama with sizes that tests share, so that its programs are compiled once a session."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trtllm_jax import LLM
from trtllm_jax.engine.dispatch import Dispatch
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.llmapi import KvCacheConfig

LENGTH = 160
SIZES: dict[str, Any] = {"dtype": "float32", "max_batch_size": 4, "max_num_tokens": 32, "max_seq_len": LENGTH}
CACHE: dict[str, Any] = {"max_tokens": 2048, "tokens_per_block": 8}


def tiny_engine(folder: Path, **more: Any) -> LLM:
    """An engine with `SIZES` and `CACHE`; of further arguments only sizes lead to new compilations."""
    return LLM(folder, **{"kv_cache_config": KvCacheConfig(**CACHE), **SIZES, **more})


FIRST_TOKENS = 2
"""Dispatches after which the first tokens of waiting requests are read: the second is sent before the first is read."""


@contextmanager
def held(llm: LLM, after: int = 0) -> Iterator[threading.Event]:
    """Pause the engine after `after` steps, until the event is set or the block ends.

    A test can thus act while requests are in a known state, however slow the machine.
    """
    packer, resume, numbers = llm._engine._packer, threading.Event(), itertools.count()
    step = packer.step

    def gated(plan: StepPlan) -> list[Dispatch]:
        if next(numbers) >= after:
            resume.wait()
        return step(plan)

    packer.step = gated
    try:
        yield resume
    finally:
        resume.set()
        packer.step = step
