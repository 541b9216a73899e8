"""The public API over a tiny random model: what users call, what they get, what goes wrong and how it is said."""

import asyncio
import gc
import itertools
import json
import pickle
import shutil
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from trtllm_jax import LLM, RequestOutput, SamplingParams
from trtllm_jax.common.errors import EngineDeadError
from trtllm_jax.engine.dispatch import Dispatch
from trtllm_jax.engine.runner import Results
from trtllm_jax.llmapi import BuildConfig, KvCacheConfig, SchedulerConfig

from ..tiny_engine import CACHE, FIRST_TOKENS, LENGTH, held, tiny_engine

EOS = 256
COMPILED = "/jax/core/compile/backend_compile_duration"


def make(folder: Path, **kwargs: object) -> LLM:
    return tiny_engine(folder, **{"kv_cache_config": KvCacheConfig(**CACHE, event_buffer_max_size=100), **kwargs})


@pytest.fixture(scope="module")
def llm(tiny_llama: Path):
    with make(tiny_llama) as llm:
        yield llm


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


FREE = SamplingParams(max_tokens=20, ignore_eos=True)


class TestInputs:
    def test_one_prompt_gives_one_output(self, llm: LLM) -> None:
        assert isinstance(llm.generate("hello", FREE), RequestOutput)
        assert isinstance(llm.generate([1, 2, 3], FREE), RequestOutput)
        assert isinstance(llm.generate({"prompt": "hello"}, FREE), RequestOutput)

    def test_a_list_keeps_its_order(self, llm: LLM) -> None:
        prompts = [ids(n, n) for n in (5, 40, 3, 17, 60, 9)]
        outputs = llm.generate(prompts, FREE)
        assert [o.prompt_token_ids for o in outputs] == prompts
        assert [o.outputs[0].token_ids for o in outputs] == [
            llm.generate(p, FREE).outputs[0].token_ids for p in prompts
        ]

    def test_text_and_ids_are_the_same_prompt(self, llm: LLM) -> None:
        text = llm.generate("Hello", FREE)
        by_ids = llm.generate({"prompt_token_ids": text.prompt_token_ids}, FREE)
        assert text.prompt == "Hello"
        assert by_ids.prompt is None
        assert text.outputs[0].token_ids == by_ids.outputs[0].token_ids

    def test_one_sampling_params_each(self, llm: LLM) -> None:
        each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 5, 9)]
        assert [o.outputs[0].length for o in llm.generate(["a", "b", "c"], each)] == [1, 5, 9]

    @pytest.mark.parametrize(
        ("inputs", "error", "says"),
        [
            ([], ValueError, "empty list"),
            ("", ValueError, "no tokens"),
            ([300], ValueError, "0 to 257"),
            ([-1], ValueError, "0 to 257"),
            (5, TypeError, "str or list of int"),
            (None, TypeError, "str or list of int"),
            ([1, True], TypeError, "bool"),
            ({"text": "a"}, ValueError, "prompt_token_ids"),
            ({"prompt_token_ids": "a"}, TypeError, "list of int"),
            ({}, ValueError, "prompt_token_ids"),
            ("x" * LENGTH, ValueError, "max_seq_len"),
            ([["a"]], TypeError, "list of str"),
        ],
    )
    def test_a_bad_prompt_is_named(self, llm: LLM, inputs: object, error: type[Exception], says: str) -> None:
        with pytest.raises(error, match=says):
            llm.generate(inputs, FREE)

    def test_one_bad_prompt_starts_none(self, llm: LLM) -> None:
        llm.get_stats()
        with pytest.raises(ValueError, match="max_seq_len"):
            llm.generate(["good", "x" * 500], FREE)
        assert llm.get_stats() == []

    def test_wrong_number_or_type_of_params(self, llm: LLM) -> None:
        with pytest.raises(ValueError, match="2 entries for 1"):
            llm.generate(["a"], [FREE, FREE])
        with pytest.raises(TypeError, match="SamplingParams"):
            llm.generate("a", {"max_tokens": 3})
        with pytest.raises(ValueError, match="at most 20"):
            llm.generate("a", SamplingParams(logprobs=21))
        with pytest.raises(ValueError, match="lora_request"):
            llm.generate("a", FREE, lora_request="x")

    def test_max_tokens_is_cut_to_the_sequence_length(self, llm: LLM) -> None:
        output = llm.generate(ids(LENGTH - 28), SamplingParams(max_tokens=1000, ignore_eos=True)).outputs[0]
        assert (output.length, output.finish_reason) == (28, "length")

    def test_truncated_prompt_keeps_its_end(self, llm: LLM) -> None:
        prompt = ids(50)
        cut = llm.generate(prompt, SamplingParams(max_tokens=4, truncate_prompt_tokens=10, ignore_eos=True))
        assert cut.prompt_token_ids == prompt[-10:]


class TestResults:
    def test_greedy_equals_transformers(self, llm: LLM, greedy_by_transformers) -> None:
        prompts = [ids(n, n) for n in (1, 7, 8, 33, 90)]
        for prompt, output in zip(prompts, llm.generate(prompts, FREE), strict=True):
            assert output.outputs[0].token_ids == greedy_by_transformers(prompt, 20)

    @pytest.mark.slow
    def test_greedy_equals_transformers_with_narrow_steps(self, tiny_llama: Path, greedy_by_transformers) -> None:
        policy = SchedulerConfig(capacity_scheduler_policy="MAX_UTILIZATION")
        cache = KvCacheConfig(max_tokens=128, tokens_per_block=4)  # far less than the four prompts need
        with make(tiny_llama, kv_cache_config=cache, scheduler_config=policy, disable_overlap_scheduler=True) as llm:
            prompts = [ids(n, n) for n in (30, 35, 40, 45)]
            outputs = llm.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True))
            assert llm.get_stats()[-1]["inflightBatchingStats"]["numPausedRequests"] > 0
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.outputs[0].token_ids == greedy_by_transformers(prompt, 40)

    def test_stop_token(self, llm: LLM, greedy_by_transformers) -> None:
        prompt = ids(9)
        free = greedy_by_transformers(prompt, 20)
        stop = free[6]
        end = free.index(stop)
        output = llm.generate(prompt, SamplingParams(max_tokens=20, stop_token_ids=[stop], ignore_eos=True)).outputs[0]
        assert (output.token_ids, output.finish_reason, output.stop_reason) == (free[:end], "stop", stop)
        kept = SamplingParams(max_tokens=20, stop_token_ids=[stop], ignore_eos=True, include_stop_str_in_output=True)
        assert llm.generate(prompt, kept).outputs[0].token_ids == free[: end + 1]
        by_end_id = llm.generate(prompt, SamplingParams(max_tokens=20, end_id=stop)).outputs[0]
        assert (by_end_id.token_ids, by_end_id.finish_reason, by_end_id.stop_reason) == (free[:end], "stop", None)

    def test_every_end_id_of_the_generation_config_stops(
        self, tiny_llama: Path, greedy_by_transformers, tmp_path: Path
    ) -> None:
        prompt = ids(9)
        free = greedy_by_transformers(prompt, 20)
        folder = shutil.copytree(tiny_llama, tmp_path / "model")
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, free[6]]}))
        with make(folder) as llm:
            output = llm.generate(prompt, SamplingParams(max_tokens=20)).outputs[0]
            assert (output.token_ids, output.finish_reason) == (free[: free.index(free[6])], "stop")
            assert llm.generate(prompt, FREE).outputs[0].token_ids == free

    def test_more_stop_tokens_than_the_device_looks_for(self, llm: LLM, greedy_by_transformers) -> None:
        prompt = ids(9)
        free = greedy_by_transformers(prompt, 20)
        never = [token for token in range(256) if token not in free][:12]
        params = SamplingParams(max_tokens=20, stop_token_ids=[*never, free[10]], ignore_eos=True)
        assert llm.generate(prompt, params).outputs[0].token_ids == free[: free.index(free[10])]

    def test_stop_string_over_a_token_border(self, llm: LLM) -> None:
        whole = llm.generate("go", SamplingParams(max_tokens=60, ignore_eos=True)).outputs[0]
        stop = whole.text[20:23]
        output = llm.generate("go", SamplingParams(max_tokens=60, ignore_eos=True, stop=stop)).outputs[0]
        assert output.text == whole.text[: whole.text.index(stop)]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.token_ids == whole.token_ids[: output.length]

    def test_n_samples_share_a_prompt_and_differ(self, llm: LLM) -> None:
        params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
        output = llm.generate(ids(21), params)
        texts = [tuple(sample.token_ids) for sample in output.outputs]
        assert len(set(texts)) == 3
        assert [sample.index for sample in output.outputs] == [0, 1, 2]
        alone = [
            llm.generate(ids(21), SamplingParams(temperature=1.0, seed=5 + i, max_tokens=12, ignore_eos=True))
            for i in range(3)
        ]
        assert texts == [tuple(a.outputs[0].token_ids) for a in alone]

    def test_seed_makes_a_draw_repeat_whatever_else_runs(self, llm: LLM) -> None:
        params = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=11, max_tokens=16, ignore_eos=True)
        alone = llm.generate("abc", params).outputs[0].token_ids
        crowd = llm.generate(["x", "abc", "yy", "zzz"], params)
        assert crowd[1].outputs[0].token_ids == alone
        other = llm.generate("abc", SamplingParams(temperature=0.9, seed=12, max_tokens=16, ignore_eos=True))
        assert other.outputs[0].token_ids != alone

    def test_logprobs_equal_transformers(self, llm: LLM, tiny_llama: Path) -> None:
        import torch
        from transformers import LlamaForCausalLM

        prompt = ids(13)
        output = llm.generate(prompt, SamplingParams(max_tokens=8, logprobs=3, ignore_eos=True)).outputs[0]
        model = LlamaForCausalLM.from_pretrained(tiny_llama).eval()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1)
        for position, (token, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            assert list(entry) == expected[position].topk(3).indices.tolist()
            assert entry[token].rank == 1
            for one, value in entry.items():
                assert value.logprob == pytest.approx(expected[position, one].item(), abs=1e-4)
        own = [expected[i, token].item() for i, token in enumerate(output.token_ids)]
        assert output.cumulative_logprob == pytest.approx(sum(own), abs=1e-3)

    def test_print_is_readable(self, llm: LLM) -> None:
        shown = str(llm.generate("Hello, my name is", SamplingParams(max_tokens=3, ignore_eos=True)))
        assert shown.startswith("RequestOutput(request_id=")
        assert "prompt='Hello, my name is'" in shown
        assert "finish_reason='length'" in shown

    def test_detokenize_false_gives_no_text(self, llm: LLM) -> None:
        output = llm.generate("a", SamplingParams(max_tokens=5, ignore_eos=True, detokenize=False)).outputs[0]
        assert (output.text, output.length) == ("", 5)


class TestStreaming:
    def test_steps_add_up(self, llm: LLM) -> None:
        whole = llm.generate("stream", FREE).outputs[0]
        text, tokens, steps = "", [], 0
        with held(llm, after=FIRST_TOKENS) as go_on:
            for output in llm.generate("stream", FREE, streaming=True):
                text += output.outputs[0].text_diff
                tokens += output.outputs[0].token_ids_diff
                assert output.outputs[0].text == text
                steps += 1
                go_on.set()
        assert (text, tokens) == (whole.text, whole.token_ids)
        assert steps > 1

    def test_an_interval_joins_steps_and_loses_nothing(self, tiny_llama: Path, llm: LLM) -> None:
        params = SamplingParams(max_tokens=60, ignore_eos=True, logprobs=1)
        whole = llm.generate("stream", params).outputs[0]
        with make(tiny_llama, stream_interval=3) as rare:
            deliveries = [
                (output.outputs[0].text_diff, list(output.outputs[0].token_ids_diff), output.outputs[0].logprobs_diff)
                for output in rare.generate("stream", params, streaming=True)
            ]
            steps = len(rare.get_stats())
        texts, tokens, logprobs = zip(*deliveries, strict=True)
        assert "".join(texts) == whole.text
        assert [*itertools.chain(*tokens)] == whole.token_ids
        assert [list(entry) for entry in itertools.chain(*logprobs)] == [list(entry) for entry in whole.logprobs]
        assert len(deliveries) <= steps / 3 + 2, "one delivery for three steps, and the last"

    def test_async_iteration_and_await(self, llm: LLM) -> None:
        async def main() -> tuple[str, str, list[RequestOutput]]:
            text = ""
            async for output in llm.generate_async("stream", FREE, streaming=True):
                text += output.outputs[0].text_diff
            awaited = await llm.generate_async("stream", FREE)
            several = await asyncio.gather(*(llm.generate_async(f"p{i}", FREE).aresult() for i in range(6)))
            return text, awaited.outputs[0].text, several

        text, awaited, several = asyncio.run(main())
        assert text == awaited == llm.generate("stream", FREE).outputs[0].text
        assert [o.outputs[0].token_ids for o in several] == [
            o.outputs[0].token_ids for o in llm.generate([f"p{i}" for i in range(6)], FREE)
        ]

    def test_result_times_out_and_goes_on(self, llm: LLM) -> None:
        with held(llm):
            future = llm.generate_async("slow", SamplingParams(max_tokens=100, ignore_eos=True))
            with pytest.raises(TimeoutError, match="still runs"):
                future.result(timeout=0)
        assert future.result(timeout=60).outputs[0].length == 100

    def test_abort_ends_it_and_frees_its_pages(self, llm: LLM) -> None:
        with held(llm, after=FIRST_TOKENS):
            future = llm.generate_async(ids(20), SamplingParams(max_tokens=100, ignore_eos=True), streaming=True)
            next(future)
            future.abort()
        output = future.result(timeout=60).outputs[0]
        assert future.aborted()
        assert output.finish_reason == "cancelled"
        assert 0 < output.length < 100
        assert llm.generate("x", FREE).finished
        assert llm.get_stats()[-1]["kvCacheStats"]["usedNumBlocks"] <= 4

    def test_from_many_threads(self, llm: LLM) -> None:
        expected = [llm.generate(f"thread {i}", FREE).outputs[0].token_ids for i in range(8)]
        found: dict[int, list[int]] = {}

        def work(i: int) -> None:
            found[i] = llm.generate(f"thread {i}", FREE).outputs[0].token_ids

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [found[i] for i in range(8)] == expected

    def test_an_interrupt_aborts_what_it_waited_for(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[RequestOutput] = []

        def interrupted(self: RequestOutput, timeout: float | None = None) -> RequestOutput:
            started.append(self)
            raise KeyboardInterrupt

        original = RequestOutput.result
        monkeypatch.setattr(RequestOutput, "result", interrupted)
        with held(llm), pytest.raises(KeyboardInterrupt):
            llm.generate(["a"], SamplingParams(max_tokens=120, ignore_eos=True))
        monkeypatch.setattr(RequestOutput, "result", original)
        assert started[0].result(timeout=60).outputs[0].finish_reason == "cancelled"


class TestCache:
    def test_a_known_prefix_is_found_and_changes_nothing(self, llm: LLM, greedy_by_transformers) -> None:
        prompt = ids(64, seed=77)
        first = llm.generate(prompt, FREE).outputs[0].token_ids
        llm.get_stats()
        second = llm.generate(prompt, FREE).outputs[0].token_ids
        stats = llm.get_stats()
        assert first == second == greedy_by_transformers(prompt, 20)
        assert stats[0]["inflightBatchingStats"]["numCtxTokens"] == 8

    def test_a_salt_keeps_prefixes_apart(self, llm: LLM) -> None:
        prompt = {"prompt_token_ids": ids(64, seed=78), "cache_salt": "tenant"}
        llm.generate({**prompt, "cache_salt": "other"}, FREE)
        llm.get_stats()
        llm.generate(prompt, FREE)
        assert sum(s["inflightBatchingStats"]["numCtxTokens"] for s in llm.get_stats()) == 64

    def test_events_and_capacity(self, llm: LLM) -> None:
        llm.get_kv_cache_events()
        llm.generate(ids(24, seed=79), SamplingParams(max_tokens=1, ignore_eos=True))
        stored = [event["data"] for event in llm.get_kv_cache_events() if event["data"]["type"] == "stored"]
        assert len(stored) == 3
        assert [t["token_id"] for t in stored[0]["blocks"][0]["tokens"]] == ids(24, seed=79)[:8]
        assert stored[1]["parent_hash"] == stored[0]["blocks"][0]["block_hash"]
        assert llm.get_kv_cache_capacity() == {"maxNumBlocks": 256, "tokensPerBlock": 8, "maxNumTokens": 2048}


class TestLife:
    def test_no_request_causes_a_compile(self, llm: LLM) -> None:
        compiled: list[str] = []

        def listen(event: str, duration: float, **kwargs: object) -> None:
            compiled.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            for count in (1, 3, 7):
                prompts = [ids(n * 11 + 1, n) for n in range(count)]
                llm.generate(prompts, SamplingParams(max_tokens=9, ignore_eos=True))
                llm.generate(prompts, SamplingParams(max_tokens=9, temperature=0.8, top_p=0.9, top_k=9, logprobs=2))
            llm.generate(ids(20), SamplingParams(n=4, temperature=1.0, max_tokens=5))
            changed = SamplingParams(max_tokens=5, repetition_penalty=1.2, logprobs=1, prompt_logprobs=1)
            for count in (1, 4):
                llm.generate([ids(9 * n + 30, n) for n in range(count)], changed)
            assert COMPILED not in compiled
            # The listener does hear a compile: this shape is new to the process.
            jax.jit(lambda x: x * 3 + 1)(np.ones((3, 5, 7), np.float32))
            assert COMPILED in compiled
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    def test_a_dead_engine_fails_every_waiter(self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        llm = make(tiny_llama)
        runner = llm._engine._runner
        run = runner.run
        calls = itertools.count(1)

        def fail_at_the_third(dispatches: Sequence[Dispatch]) -> Results:
            if next(calls) == 3:
                raise OSError("the device fell off the bus")
            return run(dispatches)

        monkeypatch.setattr(runner, "run", fail_at_the_third)
        # More sequences than rows, each far longer than three dispatches: some run, some wait.
        waiting = [llm.generate_async("wait", SamplingParams(max_tokens=120, ignore_eos=True)) for _ in range(6)]
        for future in waiting:
            with pytest.raises(EngineDeadError, match="fell off the bus") as caught:
                future.result(timeout=60)
            assert isinstance(caught.value.__cause__, OSError)
            assert future.error is not None
        with pytest.raises(EngineDeadError, match="fell off the bus"):
            llm.generate("more", FREE)
        llm.shutdown()

    def test_shutdown_cancels_and_frees(self, tiny_llama: Path) -> None:
        before = {id(array) for array in jax.live_arrays()}
        llm = make(tiny_llama)
        future = llm.generate_async("wait", SamplingParams(max_tokens=120, ignore_eos=True))
        llm.shutdown()
        assert future.result(timeout=60).outputs[0].finish_reason in ("cancelled", "length")
        llm.shutdown()
        with pytest.raises(RuntimeError, match="shutting down"):
            llm.generate("a")
        del llm, future
        gc.collect()
        assert {id(array) for array in jax.live_arrays()} <= before

    def test_a_dropped_llm_stops_by_itself(self, tiny_llama: Path) -> None:
        before = set(threading.enumerate())
        llm = make(tiny_llama)
        threads = {
            thread
            for thread in set(threading.enumerate()) - before
            if thread.name in ("trtllm_jax-engine", "trtllm_jax-postprocess")
        }
        assert len(threads) == 2
        llm.generate("a", FREE)
        seen = weakref.ref(llm)
        del llm
        gc.collect()
        assert seen() is None
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()

    def test_two_at_once(self, llm: LLM, tiny_llama: Path) -> None:
        with make(tiny_llama) as other:
            both = [one.generate_async("both", FREE) for one in (llm, other)]
            first, second = (future.result(timeout=60).outputs[0].token_ids for future in both)
        assert first == second

    def test_cannot_be_pickled(self, llm: LLM) -> None:
        with pytest.raises(RuntimeError, match="cannot be pickled"):
            pickle.dumps(llm)

    def test_manual_configuration(self, tiny_llama: Path) -> None:
        build = BuildConfig(max_batch_size=2, max_input_len=64, max_seq_len=100, max_beam_width=4, max_num_tokens=16)
        cache = KvCacheConfig(free_gpu_memory_fraction=0.9, enable_block_reuse=True, max_tokens=256)
        llm = LLM(tiny_llama, tensor_parallel_size=2, build_config=build, kv_cache_config=cache, dtype="float32")
        with llm:
            params = SamplingParams(max_tokens=10, temperature=0.8, top_p=0.9)
            (output,) = llm.generate(["Tell me about artificial intelligence"], sampling_params=params)
            assert output.finished
            with pytest.raises(ValueError, match="max_input_len is 64"):
                llm.generate("x" * 65)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"tensor_paralel_size": 2}, "tensor_parallel_size"),
            ({"quant_config": object()}, "not available"),
            ({"dtype": "int3"}, "dtype"),
        ],
    )
    def test_bad_arguments_are_named(self, tiny_llama: Path, arguments: dict[str, object], says: str) -> None:
        with pytest.raises(ValueError, match=says):
            LLM(tiny_llama, **arguments)

    def test_too_few_devices(self, tiny_llama: Path) -> None:
        with pytest.raises(RuntimeError, match="are available"):
            LLM(tiny_llama, tensor_parallel_size=64)

    def test_skip_tokenizer_init(self, tiny_llama: Path) -> None:
        with make(tiny_llama, skip_tokenizer_init=True) as llm:
            with pytest.raises(ValueError, match="end_id"):
                llm.generate([1, 2])
            with pytest.raises(ValueError, match="tokenizer"):
                llm.generate("text", SamplingParams(end_id=EOS))
            output = llm.generate([1, 2], SamplingParams(end_id=EOS, max_tokens=4))
            assert output.outputs[0].text == ""
