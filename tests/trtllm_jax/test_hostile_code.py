"""What `LLM` loads runs none of a checkpoint's code, whatever it is told, and believes no token id."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoints.checkpoint import Checkpoint
from pallas_kernels.devices import Platform
from trtllm_jax.functional.loading import resolve_dtype
from trtllm_jax.llmapi.llm_args import parse_llm_args
from trtllm_jax.llmapi.loading import load
from trtllm_jax.logger import logger
from trtllm_jax.text.tokenizer_loading import stated_end_ids


def test_trust_remote_code_warns_and_runs_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        content: dict[str, Any] = json.loads((folder / name).read_text())
        content["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
        (folder / name).write_text(json.dumps(content))
    warnings: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda message, *values: warnings.append(message))
    loaded = load(parse_llm_args(model=folder, trust_remote_code=True))
    assert [message for message in warnings if "code from a checkpoint is never run" in message]
    assert loaded.tokenizer is not None
    assert not marker.exists()


@pytest.mark.parametrize("stated", ["2", -1, 2**40, True, 1.0, {"a": 1}, [[1]], ["2"], [None]])
def test_ids_that_end_a_sequence_are_checked(stated: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint("model", tmp_path, {}, {"eos_token_id": stated})
    with pytest.raises(ValueError, match=r"has eos_token_id=.*; it must be a token id or a list of them"):
        stated_end_ids(checkpoint)


def test_ids_that_end_a_sequence_may_be_one_or_several_or_none(tmp_path: Path) -> None:
    for stated, ids in ((2, {2}), ([2, 3], {2, 3}), ([], set()), (None, set())):
        assert stated_end_ids(Checkpoint("model", tmp_path, {}, {"eos_token_id": stated})) == ids


CPU = Platform("cpu")


@pytest.mark.parametrize("config", [{"text_config": [1]}, {"dtype": ["float32"]}, {"torch_dtype": "x"}, {"dtype": 7}])
def test_a_dtype_of_another_kind_counts_as_none(config: dict[str, Any]) -> None:
    assert resolve_dtype("auto", config, CPU) == resolve_dtype("auto", {}, CPU)
