"""Fixtures of the tests of `LLM`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from trtllm_jax import LLM

from ..tiny_engine import tiny_engine


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with tiny_engine(tiny_llama) as llm:
        yield llm
