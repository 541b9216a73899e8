"""Sizes that nobody can serve are refused before work starts; what the memory does not hold is lowered, and said."""

from __future__ import annotations

import itertools
import logging
import re
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest
from click.testing import CliRunner
from jax.sharding import Mesh

import sharding
from pallas_kernels.devices import Platform
from trtllm_jax import LLM, SamplingParams
from trtllm_jax.commands.bench import command as bench
from trtllm_jax.common.strict_model import StrictModel
from trtllm_jax.engine import build, device_memory
from trtllm_jax.engine.config import EngineConfig, decode_buckets
from trtllm_jax.engine.kv_cache import CacheSpec, pool_columns
from trtllm_jax.engine.limits import SchedulerLimits
from trtllm_jax.engine.programs import Programs
from trtllm_jax.llmapi import loading
from trtllm_jax.llmapi.llm_args import BuildConfig, KvCacheConfig, LlmArgs
from trtllm_jax.nn.cache_group import CacheGroup, KeysAndValues
from trtllm_jax.requests.builder import EngineFacts, RequestBuilder
from trtllm_jax.structured.params import GuidedDecodingParams

GROUP = CacheGroup((0, 1), KeysAndValues(kv_heads=2, head_dim=16))
LIMITS = SchedulerLimits(max_batch_size=4, max_num_tokens=64, max_seq_len=4096, max_decode_steps=1)
PAGE = 2 * 2 * 2 * 32 * 16 * 4
"""Bytes of a page of 32 tokens of this cache in float32."""


def whole_numbers(record: type[StrictModel]) -> list[str]:
    """The fields that hold one."""
    hints = typing.get_type_hints(record)
    return [name for name in record.model_fields if int in (hints[name], *typing.get_args(hints[name]))]


FIELDS = [(record, name) for record in (LlmArgs, BuildConfig, KvCacheConfig) for name in whole_numbers(record)]


def test_there_are_such_fields() -> None:
    assert {"max_batch_size", "max_seq_len", "max_tokens", "max_stats_len"} <= {name for _, name in FIELDS}


@pytest.mark.parametrize("value", [-1, 10**12, 10**30, True, 1.5, float("inf"), "8", [8]])
@pytest.mark.parametrize(("record", "name"), FIELDS, ids=lambda one: getattr(one, "__name__", one))
def test_no_field_takes_what_is_no_size(record: type[StrictModel], name: str, value: Any) -> None:
    model = {"model": "m"} if record is LlmArgs else {}
    with pytest.raises(ValueError, match=rf"{record._owner}.{name} = .* is invalid: it should be "):
        record(**model, **{name: value})


@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        ({"max_batch_size": 10**7}, 16384),
        ({"max_num_tokens": 10**9}, 1 << 20),
        ({"kv_cache_config": {"tokens_per_block": 1 << 20}}, 4096),
        ({"build_config": {"max_batch_size": 10**7}}, 16384),
    ],
)
def test_what_no_device_could_compute_is_refused(arguments: dict[str, Any], most: int) -> None:
    with pytest.raises(ValueError, match=f"less than or equal to {most}"):
        LLM("m", **arguments)


@pytest.mark.parametrize("arguments", [{"max_seq_len": 257}, {"build_config": {"max_seq_len": 10**6}}])
def test_a_sequence_beyond_the_models_positions_is_refused_with_both_numbers(
    arguments: dict[str, Any], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(loading, "load_weights", read)
    length = arguments.get("max_seq_len", 10**6)
    with pytest.raises(ValueError, match=f"LLM.max_seq_len = {length} exceeds the 256 positions of the model"):
        LLM(tiny_llama, **arguments)
    with pytest.raises(AssertionError):
        LLM(tiny_llama, max_seq_len=256)


def columns(mesh: Mesh, tokens: int) -> int:
    spec = CacheSpec.of([GROUP], {}, 32, jnp.dtype("float32"), mesh)
    return pool_columns(spec, mesh, LIMITS, 0.9, 0, tokens)


def test_a_cpus_pool_is_no_larger_than_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = sharding.make_mesh(1)
    monkeypatch.setattr(device_memory, "of_host", lambda: 100 * PAGE + 1)
    assert columns(mesh, 99 * 32) == 100
    with pytest.raises(MemoryError, match=r"max_tokens=3169 needs .* GiB .* of memory .* at most 3168$"):
        columns(mesh, 99 * 32 + 1)


@pytest.mark.multi_device(2)
def test_devices_that_a_cpu_plays_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "of_host", lambda: 100 * PAGE)
    # Each holds one of the two heads.
    assert columns(sharding.make_mesh(2), 99 * 32) == 100
    with pytest.raises(MemoryError, match=r"at most 3168$"):
        columns(sharding.make_mesh(2), 100 * 32)


def test_this_machines_memory_is_that_of_the_kernel() -> None:
    (kibibytes,) = re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert 0 < device_memory.of_host() <= int(kibibytes) * 1024


def test_a_pool_beyond_the_memory_is_refused_before_anything_compiles(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_anything(*_: Any) -> None:
        raise AssertionError("a program was compiled")

    monkeypatch.setattr(Programs, "compile", compile_anything)
    with pytest.raises(MemoryError, match=r"kv_cache_config.max_tokens=1000000000 needs .* GiB"):
        LLM(tiny_llama, kv_cache_config=KvCacheConfig(max_tokens=10**9))


def sized(config: EngineConfig, positions: int = 256) -> tuple[SchedulerLimits, int]:
    model: Any = SimpleNamespace(config=SimpleNamespace(max_position=positions), platform=Platform("cpu"))
    mesh = sharding.make_mesh(1)
    spec = CacheSpec.of([GROUP], {}, config.page_size, jnp.dtype("float32"), mesh)
    limits, (pages,), _ = build._size(model, None, mesh, config, spec)
    return limits, pages


def test_what_the_cache_has_no_room_for_is_lowered_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trtllm_jax"):
        limits, pages = sized(EngineConfig(max_batch_size=8, max_seq_len=200, kv_tokens=128))
    assert (limits.max_batch_size, limits.max_seq_len, pages) == (4, 128, 5)
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("max_batch_size = 8 is lowered to 4: the KV cache has 128 tokens")
    assert told[1].startswith("max_seq_len = 200 is lowered to 128: the KV cache has 128 tokens")
    caplog.clear()
    sized(EngineConfig(kv_tokens=128))  # which names neither
    sized(EngineConfig(max_batch_size=4, max_seq_len=128, kv_tokens=128))
    assert not caplog.records


@pytest.mark.parametrize(
    ("batch", "length", "tokens", "step"), [(2, 64, 1 << 20, 128), (4, 100, 300, 300), (8, 16, 1, 8)]
)
def test_a_step_has_no_more_tokens_than_its_sequences(batch: int, length: int, tokens: int, step: int) -> None:
    limits, _ = sized(EngineConfig(max_batch_size=batch, max_seq_len=length, max_num_tokens=tokens))
    assert limits.max_num_tokens == step


def test_many_rows_are_few_programs() -> None:
    for most in (1, 7, 256, 257, 2048, 2049, 1 << 14):
        buckets = decode_buckets(most)
        assert list(buckets) == sorted(set(buckets))
        assert buckets[-1] == most
        assert len(buckets) <= 26
        assert all(larger <= 2 * smaller for smaller, larger in itertools.pairwise(buckets))


class TestOrderOfErrors:
    """Without a tokenizer an end id must be given, which is said last."""

    @pytest.fixture
    def builder(self) -> RequestBuilder:
        facts = EngineFacts(256, frozenset(), 1, 64, None, 1, False, "llama")
        return RequestBuilder(facts, None, lambda request, reason: None, lambda: None)

    @pytest.mark.parametrize(
        ("prompt", "params", "says"),
        [
            ("a text", {}, "skip_tokenizer_init"),
            ({"prompt": "a text"}, {}, "skip_tokenizer_init"),
            ([300], {}, "300; ids of this model are 0 to 255"),
            ([1], {"guided_decoding": GuidedDecodingParams(regex="a")}, "guided_decoding needs a tokenizer"),
            ([1], {"stop": "a"}, "SamplingParams.stop needs a tokenizer"),
            ([1], {"bad_token_ids": [256]}, "bad_token_ids holds 256"),
            ([1], {}, "tokenizer is required to reset end_id"),
        ],
    )
    def test_the_nearest_error_comes_first(self, builder: RequestBuilder, prompt: Any, params: Any, says: str) -> None:
        with pytest.raises(ValueError, match=says) as told:
            builder.requests([prompt], [SamplingParams(**params)], False)
        assert ("reset end_id" in str(told.value)) == ("reset end_id" in says)

    def test_an_end_id_is_enough(self, builder: RequestBuilder) -> None:
        for params in (SamplingParams(end_id=1), SamplingParams(ignore_eos=True)):
            assert builder.requests([[1]], [params], False)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max_batch_size", 10**7], "LLM.max_batch_size = 10000000 is invalid: it should be less than or equal to"),
        (["--max_num_tokens", 10**12], "LLM.max_num_tokens = 1000000000000 is invalid"),
        (["--max_seq_len", 10**12], "LLM.max_seq_len = 1000000000000 is invalid"),
        (["--max_seq_len", 10**6], "LLM.max_seq_len = 1000000 exceeds the 256 positions"),
        (["--kv_cache_max_tokens", 10**12], "KvCacheConfig.max_tokens = 1000000000000 is invalid"),
        (["--tp", 10**12], "LLM.tensor_parallel_size = 1000000000000 is invalid"),
        (["--kv_cache_max_tokens", 10**9], "kv_cache_config.max_tokens=1000000000 needs"),
        (["--input_len", 300], "has 308 tokens, prompt and answer, and the model's longest sequence has 256"),
    ],
)
def test_a_command_says_it_in_a_line(words: list[Any], says: str, tiny_llama: Path) -> None:
    sizes = ["--model", tiny_llama, "--batch_size", 1, "--output_len", 8, "--input_len", 8]
    result = CliRunner().invoke(bench.main, [str(word) for word in (*sizes, *words)], prog_name="trtllm-bench")
    assert result.exit_code in (1, 2), result.output
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 10**6), ("best_of", 10**9), ("presence_penalty", 1e39), ("frequency_penalty", -1e39), ("temperature", 1e300),
     ("repetition_penalty", 1e39)],
)  # fmt: skip
def test_what_no_device_computes_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"SamplingParams.{field} = .* is invalid: it should be (less|greater)"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("prompt", [b"x", bytearray(b"x"), [b"x"]])
def test_bytes_are_no_prompt(prompt: Any) -> None:
    builder = RequestBuilder(
        EngineFacts(256, frozenset(), 1, 64, None, 1, False, "llama"), None, lambda *_: None, lambda: None
    )
    with pytest.raises(TypeError, match="str or list of int"):
        builder.requests([prompt] if not isinstance(prompt, list) else prompt, [SamplingParams(end_id=-1)], False)
