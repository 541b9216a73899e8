"""A prefix is shared only where its keys and values would be the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from trtllm_jax import SamplingParams
from trtllm_jax.llmapi import KvCacheConfig

from ..tiny_engine import CACHE, tiny_engine

TRAINED = 40
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def stretched(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, trained for few positions, with dynamic NTK rope for four times as many."""
    folder = tmp_path_factory.mktemp("stretched")
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    path.write_text(json.dumps(config | {"max_position_embeddings": TRAINED, "rope_scaling": rope}))
    return folder


def test_dynamic_rope_gives_each_length_its_own(stretched: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 256, 140).tolist()
    first = [ids[:100], ids[:120], ids[:100], ids[:32], ids[:36], ids[:110]]
    with tiny_engine(stretched, kv_cache_config=KvCacheConfig(**CACHE, enable_block_reuse=False)) as alone:
        expected = [alone.generate(prompt, GREEDY).outputs[0].token_ids for prompt in first]
        # A conversation goes on: what was generated beyond the trained length has keys of other lengths.
        turns = [[*prompt, *answer, 7] for prompt, answer in zip(first, expected, strict=True)]
        expected += [alone.generate(prompt, GREEDY).outputs[0].token_ids for prompt in turns]
    with tiny_engine(stretched) as llm:
        outputs = [llm.generate(prompt, GREEDY) for prompt in (*first, *turns)]
    assert [output.outputs[0].token_ids for output in outputs] == expected
    cached = [output.cached_tokens for output in outputs]
    assert cached[:6] == [0, 0, 96, 0, 32, 0], "the same length alone, or none that is stretched"
    assert cached[6:9] == [0, 0, 112], "the third turn is the first again"
