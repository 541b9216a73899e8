"""What sentence-transformers keeps beside a model is read, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints.sentence_transformers import score_activation, stated_pooling


def write(folder: Path, kinds: list[str], config: Any = None, path: str = "1_Pooling") -> Path:
    modules = [{"idx": i, "type": f"sentence_transformers.models.{kind}", "path": path} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config or {"pooling_mode_mean_tokens": True}))
    return folder


@pytest.mark.parametrize(
    ("config", "how"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling(tmp_path: Path, config: dict[str, Any], how: str, normalize: bool) -> None:
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    assert stated_pooling(write(tmp_path, kinds, config)) == (how, normalize)


def test_nothing_is_stated(tmp_path: Path) -> None:
    assert stated_pooling(tmp_path) is None


@pytest.mark.parametrize(
    ("kinds", "config", "path", "message"),
    [
        (["Transformer", "Pooling", "Dense"], None, "1_Pooling", "a module of type 'Dense'; read here: Transformer"),
        (["Transformer", "Normalize"], None, "1_Pooling", "names no Pooling module"),
        (["Pooling"], {"pooling_mode_max_tokens": True}, "1_Pooling", r"asks for \['pooling_mode_max_tokens'\]"),
        (["Pooling"], {"pooling_mode_mean_tokens": False}, "1_Pooling", r"asks for \[\]; read here is one of"),
        (["Pooling"], {"pooling_mode": "mean_sqrt_len_tokens"}, "1_Pooling", "asks for .*mean_sqrt_len_tokens"),
        (
            ["Pooling"],
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "1_Pooling",
            "pooling_mode_cls_token.*pooling_mode_mean_tokens",
        ),
        (["Pooling"], None, "../elsewhere", r"has the path '\.\./elsewhere'; it must be a folder beside it"),
        (["Pooling"], None, "/etc", "has the path '/etc'"),
        (["Pooling"], None, "", "has the path ''"),
    ],
)
def test_other_modules_are_refused(
    tmp_path: Path, kinds: list[str], config: dict[str, Any] | None, path: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stated_pooling(write(tmp_path, kinds, config, path))


@pytest.mark.parametrize("content", ["{}", "[1]", '"x"'])
def test_modules_of_another_kind_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=r"modules\.json holds .*; it must be a list of objects"):
        stated_pooling(tmp_path)


@pytest.mark.parametrize(
    ("config", "labels", "activation"),
    [
        ({}, 1, "sigmoid"),
        ({}, 3, "identity"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, 3, "sigmoid"),
        ({"sentence_transformers": {"version": "5"}}, 1, "sigmoid"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, 1, "identity"),
    ],
)
def test_activations_of_cross_encoders(config: dict[str, Any], labels: int, activation: str) -> None:
    assert score_activation(config, labels) == activation


def test_another_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"config\.json has 'torch\.nn\.Softmax' make scores of logits; read"):
        score_activation({"sentence_transformers": {"activation_fn": "torch.nn.Softmax"}}, 2)
