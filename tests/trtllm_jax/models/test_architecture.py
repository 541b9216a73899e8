from __future__ import annotations

from typing import Any

import pytest

from trtllm_jax.models import architecture, llama


def test_found_by_the_name_in_the_configuration() -> None:
    assert architecture({"architectures": ["LlamaForCausalLM"]}) is llama


@pytest.mark.parametrize("config", [{"architectures": ["Perceptron"]}, {"architectures": []}, {}])
def test_unknown_one_is_an_error_that_lists_those_supported(config: dict[str, Any]) -> None:
    wanted = "'Perceptron'" if config.get("architectures") else "None"
    with pytest.raises(ValueError, match=rf"architectures names {wanted}.*supported: .*LlamaForCausalLM"):
        architecture(config)
