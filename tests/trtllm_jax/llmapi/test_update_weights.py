"""Other weights for a running LLM: what comes afterwards, what is shared, what is forgotten, and what goes wrong."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trtllm_jax import LLM, RequestOutput, SamplingParams, load_model
from trtllm_jax.common.errors import EngineDeadError, RequestError
from trtllm_jax.engine.dispatch import Dispatch
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.functional.nnx import CausalLM
from trtllm_jax.llmapi import BuildConfig, KvCacheConfig

from ..tiny_engine import tiny_engine

COMPILED = "/jax/core/compile/backend_compile_duration"
FREE = SamplingParams(max_tokens=20, ignore_eos=True)
LONG = SamplingParams(max_tokens=100, ignore_eos=True)
PROMPT = np.random.default_rng(5).integers(0, 256, 24).tolist()


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Iterator[LLM]:
    with tiny_engine(tiny_llama) as llm:
        yield llm


@pytest.fixture
def llm(engine: LLM, first: Any) -> LLM:
    """With the weights of `tiny_llama` and nothing cached."""
    engine.update_weights(first)
    engine.get_stats()
    return engine


@pytest.fixture(scope="module")
def first(tiny_llama: Path) -> Any:
    return load_model(tiny_llama, dtype="float32")[1]


@pytest.fixture(scope="module")
def other_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the same shapes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("other_llama")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(other_llama: Path) -> Any:
    return load_model(other_llama, dtype="float32")[1]


@pytest.fixture(scope="module")
def silent(first: Any) -> Any:
    """Weights whose logits are all zero, so that a greedy token is 0 whatever came before."""
    return first | {"norm": jnp.zeros_like(first["norm"])}


def by_transformers(folder: Path, prompt: list[int], answer: list[int]) -> list[int]:
    """The likeliest token after the prompt, and after each token of the answer but the last."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def generated(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def prompt_tokens(llm: LLM) -> int:
    return sum(step["inflightBatchingStats"]["numCtxTokens"] for step in llm.get_stats())


def buffers(params: Any) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]


def update_after(llm: LLM, dispatches: int, params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many of the coming dispatches read the weights of now, and the later ones `params`."""
    packer = llm._engine._packer
    step, calls = packer.step, itertools.count(1)

    def counted(plan: StepPlan) -> list[Dispatch]:
        if next(calls) == dispatches:
            threading.Thread(target=llm.update_weights, args=(params,)).start()
            wait_for_a_command(llm)
        return step(plan)

    monkeypatch.setattr(packer, "step", counted)


def wait_for_a_command(llm: LLM) -> None:
    deadline = time.monotonic() + 60
    while llm._engine._commands.empty() and time.monotonic() < deadline:
        time.sleep(0.001)


def donate(params: Any) -> Any:
    return jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnames="params")(params=params)


class TestAfterwards:
    def test_other_weights_answer(self, llm: LLM, tiny_llama: Path, other: Any, other_llama: Path) -> None:
        before = generated(llm.generate(PROMPT, FREE))
        assert before == by_transformers(tiny_llama, PROMPT, before)
        llm.update_weights(other)
        after = generated(llm.generate(PROMPT, FREE))
        assert after == by_transformers(other_llama, PROMPT, after)
        assert after != before

    def test_no_prefix_of_other_weights_is_found(self, llm: LLM, first: Any, other: Any) -> None:
        computed = []
        for params in (first, other, other, first):
            llm.update_weights(params)
            for _ in range(2):
                llm.generate(PROMPT, FREE)
                computed.append(prompt_tokens(llm))
        assert computed == [24, 8] * 4

    @pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
    def test_what_is_no_number_does_not_outlive_its_sequences(
        self, llm: LLM, first: Any, tiny_llama: Path, value: float
    ) -> None:
        """Pages have held keys and values that are not finite; what is left in one changes no later answer."""
        prompts = [[i, *PROMPT[: 3 * i % 25]] for i in range(16)]
        params = [SamplingParams(max_tokens=20, ignore_eos=True, return_context_logits=i % 4 == 0) for i in range(16)]
        before = llm.generate(prompts, params)
        llm.update_weights(jax.tree.map(lambda leaf: jnp.full_like(leaf, value), first))
        forked = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, seed=1, n=2)
        for each in llm.generate([[i, *PROMPT] for i in range(16)], [forked, LONG] * 8):
            assert all(sample.length in (40, 100) for sample in each.outputs)
        spoilt = np.flatnonzero(
            np.isnan(np.asarray(llm._engine._runner._registers["caches"][0])).any(axis=(1, 2, 3, 4))
        )
        # As many as four sequences hold at once; those that were freed last are taken first.
        assert spoilt.size > 4 * (len(PROMPT) + 20) // 8
        llm.update_weights(first)
        for prompt, old, new in zip(prompts, before, llm.generate(prompts, params), strict=True):
            assert generated(new) == generated(old) == by_transformers(tiny_llama, prompt, generated(old))
            if old.context_logits is not None:
                np.testing.assert_allclose(new.context_logits, old.context_logits, rtol=1e-5, atol=1e-5)

    def test_a_log_probability_that_is_no_number_fails_its_request_alone(self, llm: LLM, first: Any) -> None:
        llm.update_weights(jax.tree.map(lambda leaf: jnp.full_like(leaf, np.nan), first))
        others = [llm.generate_async(PROMPT, SamplingParams(max_tokens=9, ignore_eos=True)) for _ in range(2)]
        wishes: list[dict[str, Any]] = [{"logprobs": 0}, {"logprobs": 2, "temperature": 1.0, "seed": 1}]
        for wish in wishes:
            with pytest.raises(RequestError, match="the model's logits hold NaN"):
                llm.generate(PROMPT, SamplingParams(max_tokens=9, ignore_eos=True, **wish))
        assert [other.result().outputs[0].length for other in others] == [9, 9]
        llm.update_weights(first)
        assert llm.generate(PROMPT, SamplingParams(max_tokens=2, logprobs=0)).outputs[0].cumulative_logprob < 0

    def test_logprobs_are_of_the_new_weights(self, llm: LLM, other: Any, other_llama: Path) -> None:
        llm.update_weights(other)
        output = llm.generate(PROMPT, SamplingParams(max_tokens=8, temperature=1.0, seed=1, logprobs=0))
        own = [entry[token].logprob for token, entry in zip(generated(output), output.outputs[0].logprobs, strict=True)]
        model, params = load_model(other_llama, dtype="float32")
        expected = model.logprobs(params, np.array(PROMPT + generated(output)))[len(PROMPT) :]
        np.testing.assert_allclose(own, expected, atol=1e-5)

    def test_an_nnx_modules_params_are_taken(self, llm: LLM, tiny_llama: Path) -> None:
        module = CausalLM(*load_model(tiny_llama, dtype="float32"))
        llm.update_weights(module.params)
        assert buffers(llm.params) == buffers(module.params)


class TestSharing:
    def test_buffers_are_shared_and_nothing_is_compiled(self, llm: LLM, other: Any, first: Any) -> None:
        heard: list[str] = []

        def listen(event: str, duration: float, **kwargs: object) -> None:
            heard.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            llm.update_weights(other)
            assert buffers(llm.params) == buffers(other)
            llm.generate(PROMPT, FREE)
            llm.update_weights(first, copy=True)
            assert set(buffers(llm.params)).isdisjoint(buffers(first))
            llm.generate(PROMPT, FREE)
            assert COMPILED not in heard
            # The listener does hear a compile: this shape is new to the process.
            jax.jit(lambda x: x * 5 + 1)(np.ones((3, 5, 7, 2), np.float32))
            assert COMPILED in heard
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    def test_the_old_weights_are_let_go(self, llm: LLM, first: Any, other: Any) -> None:
        llm.update_weights(first, copy=True)
        seen = [weakref.ref(leaf) for leaf in jax.tree.leaves(llm.params)]
        llm.generate(PROMPT, FREE)
        llm.update_weights(other)
        gc.collect()
        assert [leaf() for leaf in seen] == [None] * len(seen)

    def test_the_loaded_weights_are_let_go(self, tiny_llama: Path, first: Any) -> None:
        with tiny_engine(tiny_llama) as llm:
            seen = [weakref.ref(leaf) for leaf in jax.tree.leaves(llm.params)]
            llm.update_weights(first)
            gc.collect()
            assert [leaf() for leaf in seen] == [None] * len(seen)


class TestInFlight:
    def test_a_running_request_goes_on_with_the_new_weights(
        self, llm: LLM, silent: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        update_after(llm, 3, silent, monkeypatch)
        answer = generated(llm.generate(PROMPT, LONG))
        # The prompt gave one token, and two decode loops up to eight each.
        before = answer[:17]
        assert before == by_transformers(tiny_llama, PROMPT, before)
        assert any(before)
        assert answer[17:] == [0] * 83

    def test_it_leaves_nothing_for_others_to_find(
        self, llm: LLM, other: Any, other_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        update_after(llm, 2, other, monkeypatch)
        following = PROMPT + generated(llm.generate(PROMPT, LONG))[:60]
        llm.get_stats()
        llm.generate(following[:33], SamplingParams(max_tokens=1, ignore_eos=True))  # from which a chain could go on
        answer = generated(llm.generate(following, FREE))
        assert answer == by_transformers(other_llama, following, answer)
        assert prompt_tokens(llm) == 33 + len(following) - 32

    def test_updates_while_many_requests_run(self, llm: LLM, first: Any, silent: Any, tiny_llama: Path) -> None:
        waiting = [llm.generate_async([i, *PROMPT], LONG) for i in range(8)]
        for _ in range(10):
            threads = [threading.Thread(target=llm.update_weights, args=(params,)) for params in (silent, first)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        assert [future.result(timeout=60).outputs[0].length for future in waiting] == [100] * 8
        llm.update_weights(first)
        answer = generated(llm.generate(PROMPT, FREE))
        assert answer == by_transformers(tiny_llama, PROMPT, answer)
        assert llm.get_stats()[-1]["kvCacheStats"]["usedNumBlocks"] <= 6


class TestErrors:
    def test_weights_that_do_not_fit_change_nothing(self, llm: LLM, other: Any) -> None:
        answer, before = generated(llm.generate(PROMPT, FREE)), llm.params
        wrong = {"layers": other["layers"], "embed": other["embed"].astype(jnp.bfloat16), "more": other["norm"]}
        with pytest.raises(ValueError, match=r"(?s)missing: norm.*unexpected: more.*embed: expected the dtype float32"):
            llm.update_weights(wrong)
        assert llm.params is before
        llm.get_stats()
        assert generated(llm.generate(PROMPT, FREE)) == answer
        assert prompt_tokens(llm) == 8

    def test_donated_weights_end_the_engine_and_the_error_says_how_to_avoid_it(
        self, tiny_llama: Path, other_llama: Path
    ) -> None:
        with tiny_engine(tiny_llama) as llm:
            params = load_model(other_llama, dtype="float32")[1]
            llm.update_weights(params, copy=True)
            lost = donate(params)
            answer = generated(llm.generate(PROMPT, FREE))
            assert answer == by_transformers(other_llama, PROMPT, answer)
            llm.update_weights(lost)
            kept = donate(lost)
            llm.update_weights(kept)  # in time: no request has run
            llm.generate(PROMPT, FREE)
            donate(kept)
            with pytest.raises(
                EngineDeadError, match=r"15 of the engine.s weights .*'embed'.*donation.*copy=True"
            ) as told:
                llm.generate([PROMPT, [1]], FREE)
            assert "deleted" in str(told.value.__cause__.__cause__)
            with pytest.raises(EngineDeadError, match="copy=True"):
                llm.update_weights(load_model(tiny_llama, dtype="float32")[1])
            with pytest.raises(EngineDeadError, match="copy=True"):
                _ = llm.params

    def test_an_update_that_waits_for_a_dying_engine_is_told(
        self, tiny_llama: Path, first: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reached, go_on = threading.Event(), threading.Event()

        def fail(plan: object) -> None:
            reached.set()
            go_on.wait(60)
            raise OSError("the device fell off the bus")

        with tiny_engine(tiny_llama) as llm:
            monkeypatch.setattr(llm._engine._runner, "run", fail)
            future = llm.generate_async(PROMPT, FREE)
            assert reached.wait(60)
            told: list[BaseException] = []

            def update() -> None:
                try:
                    llm.update_weights(first)
                except EngineDeadError as error:
                    told.append(error)

            thread = threading.Thread(target=update)
            thread.start()
            wait_for_a_command(llm)
            go_on.set()
            thread.join(60)
            assert "fell off the bus" in str(told[0])
            with pytest.raises(EngineDeadError, match="fell off the bus"):
                future.result(timeout=60)
        with pytest.raises(EngineDeadError, match="fell off the bus"):
            llm.update_weights(first)

    def test_after_shutdown_there_is_nothing_to_update(self, tiny_llama: Path, first: Any) -> None:
        llm = tiny_engine(tiny_llama)
        llm.update_weights(first)
        llm.shutdown()
        with pytest.raises(RuntimeError, match="shutting down"):
            llm.update_weights(first)
        with pytest.raises(RuntimeError, match="shutting down"):
            _ = llm.params
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(first))


@pytest.mark.multi_device(2)
def test_two_devices(tiny_llama: Path, other_llama: Path) -> None:
    import sharding

    # Of the sizes of test_llm.py here too.
    build = BuildConfig(max_batch_size=2, max_seq_len=100, max_num_tokens=16)
    cache = KvCacheConfig(max_tokens=256)
    with LLM(tiny_llama, tensor_parallel_size=2, build_config=build, kv_cache_config=cache, dtype="float32") as llm:
        alone = load_model(other_llama, dtype="float32")[1]
        with pytest.raises(ValueError, match=r"layers.0.down: expected the sharding .*'tp'.*llm.params"):
            llm.update_weights(alone)
        llm.update_weights(jax.device_put(alone, jax.tree.map(lambda leaf: leaf.sharding, llm.params)))
        answer = generated(llm.generate(PROMPT, FREE))
        assert answer == by_transformers(other_llama, PROMPT, answer)
        _, shared = load_model(tiny_llama, dtype="float32", mesh=sharding.make_mesh(2))
        llm.update_weights(shared)
        assert buffers(llm.params) == buffers(shared)
        answer = generated(llm.generate(PROMPT, FREE))
        assert answer == by_transformers(tiny_llama, PROMPT, answer)
