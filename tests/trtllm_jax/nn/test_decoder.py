"""What decoders share: which layers see a window, and the cache groups that follow."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_jax.nn.cache_group import CacheGroup, KeysAndValues
from trtllm_jax.nn.decoder import DecoderConfig, cache_spec, decoder_fields, layer_windows, same_layer
from trtllm_jax.nn.reach import Reach

KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
HF = {
    "vocab_size": 10, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"layer_types": KINDS, "sliding_window": 7}, (7, None, 7)),
        ({"layer_types": KINDS, "sliding_window": None}, (None, None, None)),
        ({"layer_types": ["full_attention"] * 3, "sliding_window": 7}, (None, None, None)),
        ({"sliding_window": 7}, (None, 7, 7)),
        ({}, (None, None, None)),
    ],
)
def test_which_layers_see_a_window(config: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert layer_windows(config, 3, lambda index: index > 0) == windows


@pytest.mark.parametrize("kinds", [KINDS[:2], "full_attention", [*KINDS[:2], "chunked_attention"], [*KINDS[:2], None]])
def test_other_kinds_of_layers_are_refused(kinds: Any) -> None:
    with pytest.raises(ValueError, match=r"layer_types=.* must be a list of num_hidden_layers=3 names"):
        layer_windows({"layer_types": kinds, "sliding_window": 7}, 3)


def test_a_window_must_be_a_number_of_tokens() -> None:
    with pytest.raises(ValueError, match=r"sliding_window=0"):
        layer_windows({"layer_types": KINDS, "sliding_window": 0}, 3)


def test_layers_of_one_window_share_a_cache_group() -> None:
    fields, kept = decoder_fields(HF), KeysAndValues(2, 2)
    config = DecoderConfig(**fields | {"windows": (7, None, 7)})
    assert cache_spec(config) == (CacheGroup((1,), kept), CacheGroup((0, 2), kept, Reach(window=7)))
    assert [same_layer(config, index) for index in range(3)] == [0, 1, 0]
    everything = DecoderConfig(**fields)
    assert cache_spec(everything) == (CacheGroup(tuple(range(everything.num_layers)), kept),)
    assert {same_layer(everything, index) for index in range(everything.num_layers)} == {0}
