from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trtllm_jax.commands.bench.model import ModelFacts


def facts(folder: Path, **config: Any) -> ModelFacts:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 40, "max_position_embeddings": 64, **config}))
    return ModelFacts(str(folder))


def test_vocabulary_and_stretched_context(tmp_path: Path) -> None:
    found = facts(tmp_path, rope_scaling={"rope_type": "linear", "factor": 2.5})
    assert (found.vocab, found.max_position) == (40, 160)
    assert facts(tmp_path, text_config={"vocab_size": 50}).vocab == 50


@pytest.mark.parametrize(
    "config", [{"text_config": [1]}, {"rope_scaling": "yarn"}, {"rope_parameters": {"factor": 1e999}}]
)
def test_what_the_engine_will_refuse_stops_no_reading(config: dict[str, Any], tmp_path: Path) -> None:
    assert facts(tmp_path, **config).max_position == 64
