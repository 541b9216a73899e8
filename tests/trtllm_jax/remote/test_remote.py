import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trtllm_jax.tiny_engine import FIRST_TOKENS, SIZES, held, tiny_engine
from trtllm_jax import EngineBusyError, EngineDeadError, SamplingParams
from trtllm_jax.engine.request import FinishReason, Request
from trtllm_jax.engine.sampling import Sampling
from trtllm_jax.llmapi import GuidedDecodingParams
from trtllm_jax.remote import wire
from trtllm_jax.remote.host import EngineHost
from trtllm_jax.remote.host_connection import RemoteSequence
from trtllm_jax.remote.llm import RemoteLLM
from trtllm_jax.requests.output_processor import OutputProcessor, PromptLogprobs
from trtllm_jax.requests.outputs import RequestOutput

ROWS, QUEUE = SIZES["max_batch_size"], 12


class Pair:
    """An engine, its host, and any number of connections to it."""

    def __init__(self, folder: Path) -> None:
        self.llm = tiny_engine(folder)
        self.host = EngineHost(self.llm, max_queue_size=QUEUE)

    def remote(self) -> RemoteLLM:
        here, there = socket.socketpair()
        self.host.connect(there)
        return RemoteLLM(here, self.llm.args)

    def close(self) -> None:
        self.host.close()
        self.llm.shutdown()


@pytest.fixture(scope="module")
def pair(tiny_llama: Path) -> Iterator[Pair]:
    pair = Pair(tiny_llama)
    yield pair
    pair.close()


@pytest.fixture
def remote(pair: Pair) -> Iterator[RemoteLLM]:
    remote = pair.remote()
    yield remote
    remote.shutdown()
    wait_until(lambda: pair.host.unfinished == 0)


def wait_until(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def seen(output: Any) -> list[Any]:
    return [
        (one.index, one.text, one.token_ids, one.finish_reason, one.stop_reason, one.logprobs, one.prompt_logprobs)
        for one in output.outputs
    ]


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"temperature": 0.9, "top_p": 0.8, "seed": 5},
        {"temperature": 1.0, "n": 3, "seed": 7, "logprobs": 2},
        {"temperature": 1.0, "n": 1, "best_of": 4, "seed": 1},
        {"logprobs": 3, "prompt_logprobs": 2},
        {"temperature": 1.0, "n": 3, "seed": 8, "prompt_logprobs": 1},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "min_tokens": 3, "no_repeat_ngram_size": 2},
        {"embedding_bias": [0.0] * 200 + [-5.0] * 58, "bad": ["a"], "bad_token_ids": [66]},
        {"temperature": 1.0, "top_p": 0.9, "top_p_decay": 0.9, "seed": 3},
        {"stop": ["\x7f", "a"], "max_tokens": 60},
        {"stop_token_ids": [3, 4, 5, 6, 7, 8], "include_stop_str_in_output": True},
        {"truncate_prompt_tokens": 4, "exclude_input_from_output": False},
    ],
)
def test_it_answers_as_the_engine_itself(pair: Pair, remote: RemoteLLM, wishes: dict[str, Any]) -> None:
    prompts = ["The cat", [5, 6, 7, 8, 9], {"prompt": "A long way from home", "cache_salt": "x"}, [12]]
    params = SamplingParams(**{"max_tokens": 20, **wishes})
    here = pair.llm.generate(prompts, params)
    there = remote.generate(prompts, params)
    assert [seen(output) for output in there] == [seen(output) for output in here]


def test_it_chats_as_the_engine_itself(pair: Pair, tiny_llama: Path) -> None:
    args = pair.llm.args.model_copy(update={"chat_template": "{{ messages[0]['content'] }}!"})
    here, there = socket.socketpair()
    pair.host.connect(there)
    remote = RemoteLLM(here, args)
    answer = remote.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=5))
    assert answer.prompt == "Hello!"
    assert seen(answer) == seen(pair.llm.generate("Hello!", SamplingParams(max_tokens=5, add_special_tokens=False)))
    remote.shutdown()


def test_a_stream_grows_to_the_whole(remote: RemoteLLM) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    whole = remote.generate([1, 2, 3], params).outputs[0]
    texts = []

    async def stream() -> None:
        async for output in remote.generate_async([1, 2, 3], params, streaming=True):
            texts.append(output.outputs[0].text_diff)

    asyncio.run(stream())
    assert "".join(texts) == whole.text


def test_embeddings_and_what_is_known_of_a_request_cross_too(pair: Pair, remote: RemoteLLM) -> None:
    prompt = list(range(40))
    here, there = pair.llm.embed(prompt), remote.embed(prompt)
    np.testing.assert_allclose(there.embedding, here.embedding, atol=1e-6)
    assert there.cached_tokens == 32
    generated = remote.generate(prompt, SamplingParams(max_tokens=3, ignore_eos=True))
    assert generated.cached_tokens == 32
    assert set(generated.metrics_dict) == {"request_queue_time", "ttft", "tpot", "e2e"}


def test_an_event_loop_may_receive(pair: Pair) -> None:
    """No thread does: the loop's tasks see what the engine says, and its end."""
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    whole = [pair.llm.generate([1, 2, number], params).outputs[0].text for number in range(6)]
    here, there = socket.socketpair()
    pair.host.connect(there)
    with asyncio.Runner() as runner:
        before = threading.active_count()
        remote = RemoteLLM(here, pair.llm.args, runner.get_loop())
        assert threading.active_count() == before

        async def stream(number: int) -> str:
            text = ""
            async for output in remote.generate_async([1, 2, number], params, streaming=True):
                text += output.outputs[0].text_diff
            return text

        async def several() -> list[str]:
            texts = await asyncio.gather(*map(stream, range(6)))
            assert await remote.get_stats_async()
            return texts

        assert runner.run(several()) == whole

        async def two_parts() -> None:
            with held(pair.llm, after=FIRST_TOKENS) as go_on:
                stream = remote.generate_async([1, 2, 0], params, streaming=True)
                first = (await anext(stream)).outputs[0].text
                go_on.set()
                assert first != (await stream.aresult()).outputs[0].text == whole[0]

        runner.run(two_parts())

        async def until_the_end() -> None:
            with held(pair.llm):
                output = remote.generate_async([1], LONG)
                there.shutdown(socket.SHUT_RDWR)
                with pytest.raises(EngineDeadError, match="has ended"):
                    await asyncio.wait_for(output.aresult(), 60)

        runner.run(until_the_end())
    wait_until(lambda: pair.host.unfinished == 0)


def test_several_processes_share_the_engine(pair: Pair, remote: RemoteLLM) -> None:
    other = pair.remote()
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    waiting = [each.generate_async([7, 8, number], params) for number in range(3) for each in (remote, other)]
    results = [output.result(60).outputs[0].token_ids for output in waiting]
    assert results[0::2] == results[1::2]
    other.shutdown()


def test_what_the_engine_says_of_itself(pair: Pair, remote: RemoteLLM) -> None:
    assert remote.facts == pair.llm.facts
    assert remote.get_kv_cache_capacity() == pair.llm.get_kv_cache_capacity()
    remote.get_stats()
    remote.generate([1, 2], SamplingParams(max_tokens=3))
    assert remote.get_stats()[-1]["kvCacheStats"]["maxNumBlocks"] == pair.llm.get_kv_cache_capacity()["maxNumBlocks"]
    assert asyncio.run(remote.get_kv_cache_events_async()) == []
    assert remote.failure is None


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"logits_processor": lambda *_: None}, "logits_processor is a function, which cannot be sent"),
        ({"return_context_logits": True}, "return_context_logits and return_generation_logits are not available"),
        ({"return_generation_logits": True}, "are not available where the engine runs in another process"),
        ({"logprobs": 21}, r"SamplingParams.logprobs = 21 is invalid: use at most 20"),
    ],
)
def test_what_cannot_be_sent_is_refused_here(remote: RemoteLLM, wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remote.generate([1, 2], SamplingParams(max_tokens=2, **wishes))


LONG = SamplingParams(max_tokens=150, ignore_eos=True)


def test_a_full_queue_refuses_and_recovers(pair: Pair, remote: RemoteLLM) -> None:
    with held(pair.llm):
        running = [remote.generate_async([number], LONG) for number in range(ROWS + QUEUE)]
        with pytest.raises(EngineBusyError, match=f"of at most {ROWS + QUEUE}"):
            remote.generate([1, 2], SamplingParams(max_tokens=2, temperature=1.0, n=2))
    with pytest.raises(ValueError, match=f"17 sequences were sent at once, and at most {ROWS + QUEUE}"):
        remote.generate([1, 2], SamplingParams(max_tokens=2, temperature=1.0, n=ROWS + QUEUE + 1))
    assert all(output.result(60).outputs[0].finish_reason == "length" for output in running)
    wait_until(lambda: pair.host.unfinished == 0)
    assert len(remote.generate([1, 2], SamplingParams(max_tokens=2)).outputs[0].token_ids) == 2


def test_what_was_aborted_frees_its_place(pair: Pair, remote: RemoteLLM) -> None:
    output = remote.generate_async([1], LONG)
    output.abort()
    assert output.result(60).outputs[0].finish_reason in ("cancelled", "length")
    wait_until(lambda: pair.host.unfinished == 0)


def test_a_process_that_ends_leaves_nothing_behind(pair: Pair) -> None:
    remote = pair.remote()
    with held(pair.llm):
        outputs = [remote.generate_async([number], LONG) for number in range(ROWS)]
        remote.shutdown()
        for output in outputs:
            with pytest.raises(EngineDeadError, match="has ended"):
                output.result(60)
    wait_until(lambda: pair.host.unfinished == 0)
    with pytest.raises(EngineDeadError):
        remote.generate([1], LONG)


@pytest.mark.parametrize(
    "sent", [b"\x00\x00\x00\x05hello", b"\x00\x00\x00\x02\x91\xc0", b"\xff", b"\x00\x00\x00\x01\xc1"]
)
def test_nonsense_ends_its_own_connection_only(pair: Pair, remote: RemoteLLM, sent: bytes) -> None:
    here, there = socket.socketpair()
    pair.host.connect(there)
    with here:
        here.settimeout(60)
        here.sendall(sent)
        here.shutdown(socket.SHUT_WR)
        while here.recv(1 << 16):
            pass
    assert remote.generate([1, 2], SamplingParams(max_tokens=2)).finished


def test_a_request_that_does_not_fit_is_refused_alone(pair: Pair, remote: RemoteLLM) -> None:
    """The engine checks again: it need not trust who sends."""

    output = RequestOutput(1, None, [1], 1, lambda: None)
    stream = OutputProcessor(output, 0, SamplingParams(), None, None, lambda _: None, PromptLogprobs([1], None))
    remote.port.submit([Request([1], 10_000, Sampling(1.0, 1, 1.0, 0.0, 0, True), owner=stream)])
    with pytest.raises(ValueError, match="exceed max_seq_len=160"):
        output.result(60)
    wait_until(lambda: pair.host.unfinished == 0)


def test_an_engine_that_fails_tells_everybody(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(tiny_llama)
    remote, other = pair.remote(), pair.remote()

    def fail(plan: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(pair.llm._engine._runner, "run", fail)
    with pytest.raises(EngineDeadError, match="no room"):
        remote.generate([1], LONG)
    assert "no room" in str(remote.failure)
    with pytest.raises(EngineDeadError, match="no room"):
        other.generate([1], LONG)
    assert "no room" in str(pair.llm.failure)
    pair.close()
    wait_until(lambda: other.failure is not None)


def test_the_process_of_the_requests_imports_no_jax(pair: Pair) -> None:
    here, there = socket.socketpair()
    code = (
        "import socket, sys; from trtllm_jax.llmapi import LlmArgs; from trtllm_jax.remote.llm import RemoteLLM\n"
        "llm = RemoteLLM(socket.socket(fileno=int(sys.argv[1])), LlmArgs(model=sys.argv[2]))\n"
        "print(llm.generate('Hi').outputs[0].token_ids, [name for name in ('jax', 'jaxlib') if name in sys.modules])"
    )
    pair.host.connect(there)
    done = subprocess.run(
        [sys.executable, "-c", code, str(here.fileno()), str(pair.llm.args.model)],
        pass_fds=[here.fileno()], capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    here.close()
    assert done.stdout == f"{pair.llm.generate('Hi').outputs[0].token_ids} []\n", done.stderr
    wait_until(lambda: pair.host.unfinished == 0)


def test_prompts_survive_the_wire_bit_by_bit(pair: Pair, remote: RemoteLLM) -> None:
    prompt = np.random.default_rng(0).integers(0, 256, 100).tolist()
    assert remote.generate(prompt, SamplingParams(max_tokens=1)).prompt_token_ids == prompt


class TestConstraints:
    """A constraint is compiled beside the connection: whatever follows on it does not wait."""

    @pytest.fixture
    def compiling(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, list[str]]]:
        """Set it to let the engine's side compile; and what it was asked to compile."""
        go_on, asked = threading.Event(), []
        matcher = pair.llm.builder.matcher

        def gated(edits: Any) -> Any:
            asked.append(edits.constraint)
            assert go_on.wait(60)
            return matcher(edits)

        monkeypatch.setattr(pair.llm.builder, "matcher", gated)
        yield go_on, asked
        go_on.set()

    GUIDED = SamplingParams(max_tokens=30, guided_decoding=GuidedDecodingParams(regex="ab{2,5}c"))

    def test_a_plain_request_and_an_abort_do_not_wait(self, remote: RemoteLLM, compiling: Any) -> None:
        go_on, asked = compiling
        guided = [remote.generate_async([1, 2], self.GUIDED) for _ in range(2)]
        plain = remote.generate([3, 4], SamplingParams(max_tokens=5, ignore_eos=True))
        assert plain.outputs[0].length == 5
        guided[0].abort()
        assert guided[0].result(60).outputs[0].finish_reason == "cancelled"
        assert asked, "they were being compiled meanwhile"
        go_on.set()
        assert guided[1].result(60).outputs[0].text.startswith("abb")

    def test_samples_of_one_prompt_share_the_compilation(self, remote: RemoteLLM, compiling: Any) -> None:
        go_on, asked = compiling
        go_on.set()
        params = self.GUIDED.model_copy(update={"n": 4, "temperature": 1.0})
        texts = [sample.text for sample in remote.generate([1, 2], params).outputs]
        assert all(re.fullmatch("ab{2,5}c", text) for text in texts)
        assert len(asked) == 1

    def test_a_failure_is_its_own_requests(
        self, remote: RemoteLLM, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(edits: Any) -> Any:
            raise RuntimeError("no memory for a lexer")

        monkeypatch.setattr(pair.llm.builder, "matcher", broken)
        output = remote.generate_async([1, 2], self.GUIDED)
        with pytest.raises(RuntimeError, match="lexer"):
            output.result(60)
        assert remote.generate([3], SamplingParams(max_tokens=3, ignore_eos=True)).outputs[0].length == 3


def test_two_threads_that_end_a_sequence_send_one_end() -> None:
    """As a client's Finish and a constraint that fails may do at one moment."""
    sent: list[Any] = []
    inside = threading.Barrier(2)

    class Connection:
        enqueue = staticmethod(sent.append)
        finished = staticmethod(lambda number: None)

    class Ending:
        """An `Update` that is read by two threads at once, wherever they may be inside together."""

        tokens, error, admission, outputs = (), None, None, {}

        @property
        def finish(self) -> FinishReason:
            with contextlib.suppress(threading.BrokenBarrierError):
                inside.wait(0.5)
            return FinishReason.CANCELLED

    new = wire.NewSequence(1, b"", 1, Sampling(1.0, 1, 1.0, 0.0, 0, True), [], None, b"", 0, None, None, [], 1)
    sequence = RemoteSequence(Connection(), new, PromptLogprobs((), None))  # type: ignore[arg-type]
    threads = [threading.Thread(target=sequence.take, args=(Ending(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [step.finish for step in sent] == ["cancelled"]
