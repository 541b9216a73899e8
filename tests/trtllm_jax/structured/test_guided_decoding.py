import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import BaseModel

from checkpoints.checkpoint import open_checkpoint
from trtllm_jax import LLM, SamplingParams
from trtllm_jax.llmapi import GuidedDecodingParams, KvCacheConfig, SchedulerConfig
from trtllm_jax.remote.host import EngineHost
from trtllm_jax.remote.llm import RemoteLLM
from trtllm_jax.structured import sandbox as sandbox_module
from trtllm_jax.structured.matcher import GrammarCompiler
from trtllm_jax.structured.sandbox import SandboxedCompiler
from trtllm_jax.text.tokenizer import Tokenizer

from ..tiny_engine import tiny_engine

EOS = 256


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with tiny_engine(tiny_llama, max_seq_len=256) as llm:
        yield llm


def guided(seed: int = 0, **more: Any) -> SamplingParams:
    wishes = {name: more.pop(name) for name in ("json", "regex", "grammar", "json_object") if name in more}
    given = {"max_tokens": 200, "temperature": 1.0, "seed": seed, **more}
    return SamplingParams(guided_decoding=GuidedDecodingParams(**wishes), **given)


class Point(BaseModel):
    x: int
    y: int


SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"a": {"enum": ["red", "green"]}, "b": {"type": "boolean"}},
     "required": ["a", "b"], "additionalProperties": False},
    {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "maxItems": 4},
    {"enum": ["only", "these", 7, None]},
    {"type": "string", "pattern": "^[ab]{3,5}$"},
    {"anyOf": [{"const": "left"}, {"type": "object", "properties": {"right": {"type": "null"}},
                                   "required": ["right"], "additionalProperties": False}]},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
def test_random_answers_are_what_a_schema_allows(llm: LLM, schema: Any) -> None:
    params = [guided(seed, json=schema) for seed in range(6)]
    outputs = llm.generate([[seed] for seed in range(6)], params)
    for output in outputs:
        answer = output.outputs[0]
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), schema)


def test_a_schema_may_be_a_text_or_a_pydantic_model(llm: LLM) -> None:
    bounded = {"type": "object", "properties": {"x": {"enum": [1]}, "y": {"enum": [2]}}, "required": ["x", "y"]}
    one = llm.generate([1], guided(json=json.dumps(bounded | {"additionalProperties": False}))).outputs[0]
    assert json.loads(one.text) == {"x": 1, "y": 2}
    assert (
        GuidedDecodingParams(json=Point).constraint()
        == GuidedDecodingParams(json=Point.model_json_schema()).constraint()
    )


@pytest.mark.parametrize("pattern", ["[a-c]{2,6}", "(yes|no)", r"\d{3}-\d{2}", "a(b|cd)*e", "[α-ω]{1,3}!"])
def test_random_answers_match_a_regular_expression(llm: LLM, pattern: str) -> None:
    outputs = llm.generate([[seed] for seed in range(6)], [guided(seed, regex=pattern) for seed in range(6)])
    ended = [output.outputs[0] for output in outputs if output.outputs[0].finish_reason == "stop"]
    assert ended
    for answer in ended:
        assert re.fullmatch(pattern, answer.text), answer.text


@pytest.mark.parametrize(
    "grammar", ['root ::= sum\nsum ::= digit ("+" digit){1,3}\ndigit ::= [0-9]', 'start: D ("+" D){1,3}\nD: /[0-9]/']
)
def test_random_answers_are_sentences_of_a_grammar(llm: LLM, grammar: str) -> None:
    outputs = llm.generate([[seed] for seed in range(6)], [guided(seed, grammar=grammar) for seed in range(6)])
    for output in outputs:
        assert re.fullmatch(r"\d(\+\d){1,3}", output.outputs[0].text)


def test_any_object(llm: LLM) -> None:
    outputs = llm.generate([[seed] for seed in range(8)], [guided(seed, json_object=True) for seed in range(8)])
    for output in outputs:
        answer = output.outputs[0]
        assert answer.text.lstrip().startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text), dict)


def test_the_allowed_bytes_are_those_that_can_still_match(llm: LLM) -> None:
    """Against brute force over every text of the expression's language."""
    words = {"ab", "abc", "b", "bcc"}
    compiler = GrammarCompiler(llm.tokenizer, 258, [EOS])
    matcher = compiler.start(GuidedDecodingParams(regex="|".join(words)).constraint())
    ids = {byte: llm.tokenizer.encode(byte, add_special_tokens=False)[0] for byte in "abc"}

    def check(matcher: Any, text: str) -> None:
        logits = np.zeros(300, np.float32)
        matcher.restrict(logits, logits.copy())
        going_on = {ids[word[len(text)]] for word in words if word.startswith(text) and len(word) > len(text)}
        assert set(np.flatnonzero(logits == 0)) == going_on | ({EOS} if text in words else set())
        for byte, token in ids.items():
            if token in going_on:
                after = matcher.copy()
                after.accept(token)
                check(after, text + byte)

    check(matcher, "")


def test_the_likeliest_allowed_token_is_taken(llm: LLM) -> None:
    """Greedy: at each place the best of what the expression allows, by the logits that transformers agrees with."""
    output = llm.generate(
        [5, 6], guided(regex="[a-z]{8}", temperature=0, return_generation_logits=True, logprobs=0)
    ).outputs[0]
    letters = [llm.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abcdefghijklmnopqrstuvwxyz"]
    assert output.token_ids == [letters[int(np.argmax(logits[letters]))] for logits in output.generation_logits[:8]]
    # Log-probabilities are the model's own.
    logits = output.generation_logits[0]
    own = logits[output.token_ids[0]] - np.log(np.exp(logits).sum())
    assert output.logprobs[0][output.token_ids[0]].logprob == pytest.approx(own, abs=1e-4)


def test_samples_go_their_own_ways(llm: LLM) -> None:
    answers = llm.generate([1], guided(regex="[a-z]{12}", n=4)).outputs
    assert all(re.fullmatch("[a-z]{12}", answer.text) for answer in answers)
    assert len({answer.text for answer in answers}) == 4


def test_others_are_not_touched(llm: LLM) -> None:
    free = SamplingParams(max_tokens=30, ignore_eos=True)
    alone = llm.generate([3, 4], free).outputs[0].token_ids
    together = llm.generate([[3, 4], [1], [3, 4]], [free, guided(regex="a{20}"), free])
    assert [output.outputs[0].token_ids for output in together[::2]] == [alone, alone]
    assert together[1].outputs[0].text == "a" * 20


def test_the_constraint_wins_over_bans_and_needs_no_end_id(llm: LLM) -> None:
    output = llm.generate([1], guided(regex="aaa", bad=["a"], min_tokens=50, ignore_eos=True)).outputs[0]
    assert (output.text, output.finish_reason) == ("aaa", "stop")


def test_stop_strings_and_streams(llm: LLM) -> None:
    params = guided(regex="[a-c]{40}", stop=["b"])
    texts = [output.outputs[0].text for output in llm.generate_async([2], params, streaming=True)]
    assert re.fullmatch("[ac]*", texts[-1])
    assert all(texts[-1].startswith(text) for text in texts)


def test_it_works_from_another_process(llm: LLM) -> None:
    host = EngineHost(llm, max_queue_size=8)
    here, there = socket.socketpair()
    host.connect(there)
    remote = RemoteLLM(here, llm.args)
    params = guided(3, regex="[a-z]{10}", n=2)
    expected = [answer.text for answer in llm.generate([1, 2], params).outputs]
    assert [answer.text for answer in remote.generate([1, 2], params).outputs] == expected
    with pytest.raises(ValueError, match="cannot be followed"):
        remote.generate([1, 2], guided(regex="(a"))
    remote.shutdown()
    host.close()


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({}, r"got nothing: give one of json, regex, grammar, json_object"),
        ({"regex": "a", "json_object": True}, "got regex and json_object: give one of"),
        ({"regex": ""}, "regex = '' is invalid"),
        ({"grammar": 5}, "grammar = 5 is invalid"),
        ({"json": "{"}, "json is no JSON schema: Expecting property name"),
        ({"json": [1]}, "json is a list: give a schema"),
        ({"json": {"a": {1, 2}}}, "json is no JSON schema"),
        ({"json": {"const": float("nan")}}, "json is no JSON schema"),
        ({"regex": "\ud800"}, "regex holds half of a surrogate pair"),
        ({"grammar": 'root ::= "\udfff"'}, "grammar holds half of a surrogate pair"),
        ({"json_object": "yes"}, "json_object = 'yes' is invalid"),
        ({"structural_tag": "x"}, "structural_tag is not available"),
        ({"regex": "a" * 300_000}, "regex has 300000 characters"),
        ({"json": json.loads('{"a":' * 70 + "{}" + "}" * 70)}, "more than 64 objects"),
    ],
)
def test_wrong_parameters(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidedDecodingParams(**wishes)


@pytest.mark.parametrize(
    "wishes",
    [
        {"regex": "(a"}, {"regex": "(?=a)b"}, {"grammar": "root ::= missing"},
        {"grammar": "nonsense"}, {"json": {"type": "nothing"}}, {"json": {"$ref": "http://elsewhere/x"}},
        {"json": {"type": "object", "properties": []}},
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_before_anything_runs(llm: LLM, wishes: dict[str, Any]) -> None:
    llm.get_stats()
    with pytest.raises(ValueError, match=r"guided_decoding cannot be followed|cannot be read") as caught:
        llm.generate([1], guided(**wishes))
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert llm.get_stats() == []


def test_what_becomes_too_large_fails_alone(llm: LLM) -> None:
    other = llm.generate_async([1], SamplingParams(max_tokens=100, ignore_eos=True))
    with pytest.raises(ValueError, match=r"cannot be followed: lexer error: too many expressions constructed $"):
        llm.generate([1], guided(regex="a{1000000}{1000000}"))
    assert len(other.result(60).outputs[0].token_ids) == 100


def test_wrong_type_of_parameter() -> None:
    with pytest.raises(ValueError, match=r"SamplingParams.guided_decoding = .* is invalid"):
        SamplingParams(guided_decoding={"regex": "a"})


def chained(count: int, wrap: Any) -> dict[str, Any]:
    """A schema whose every definition needs the next one."""
    links = {f"d{i}": wrap({"$ref": f"#/$defs/d{i + 1}"}) for i in range(count)}
    return {"$defs": {**links, f"d{count}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


CRASHES: dict[str, Any] = {
    "references": {"json": chained(5000, lambda link: link)},
    "rules": {"grammar": "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(12_000)) + 'a12000: "x"'},
}
LOOPS: dict[str, Any] = {
    "intersections behind a token": {"grammar": "start: <[256]>? A\nA: " + " & ".join(
        f"/(.*[a-{chr(98 + i % 20)}]){{{i + 1}}}.*/" for i in range(60))},
}  # fmt: skip


@pytest.mark.parametrize("wishes", [*CRASHES.values(), *LOOPS.values()], ids=[*CRASHES, *LOOPS])
@pytest.mark.slow
def test_what_would_crash_or_hang_the_compiler_is_refused(llm: LLM, wishes: dict[str, Any]) -> None:
    """Each of these ends this process by SIGSEGV, or keeps a thread for a minute, where nothing tries it before."""
    other = llm.generate_async([1], SamplingParams(max_tokens=100, ignore_eos=True))
    with pytest.raises(ValueError, match="takes too long, too much memory or too deep a recursion"):
        llm.generate([1], guided(**wishes))
    assert len(other.result(60).outputs[0].token_ids) == 100


def test_a_constraint_is_compiled_once_and_blocks_no_other_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = SandboxedCompiler(300, {256: "<|end|>"})
    tried: list[str] = []
    monkeypatch.setattr(SandboxedCompiler, "_run", lambda self, constraint: tried.append(constraint) or True)
    assert [sandbox.compiles(constraint) for constraint in "aba"] == [True] * 3
    assert tried == ["a", "b"]

    entered, leave = threading.Event(), threading.Event()

    def slow(self: SandboxedCompiler, constraint: str) -> bool:
        entered.set()
        return leave.wait(60)

    monkeypatch.setattr(SandboxedCompiler, "_run", slow)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(llm.generate, [1], guided(regex="never seen before"))
        assert entered.wait(60)
        llm.generate([1], SamplingParams(max_tokens=2))
        assert not waiting.done()
        leave.set()
        assert waiting.result(60).outputs[0].text == "never seen before"


def test_a_sandbox_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "__file__", "/nowhere/sandbox.py")
    with pytest.raises(RuntimeError, match="could not be started to try the constraint"):
        SandboxedCompiler(300, {}).compiles("anything")


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        ('root ::= "a"\n    | "b" # or so\n    # not "c"\n\n    | "#d"\n', {"a", "b", "#d"}),
        ('# a comment | "x"\nroot ::= one two\none ::= [a-b]\n# more\ntwo ::= "[" | "\\""', {"a[", 'a"', "b[", 'b"'}),
        ('root ::= "start: " ("x" |\n "y")', {"start: x", "start: y"}),
    ],
)
def test_ebnf_with_comments_and_alternatives_on_lines_of_their_own(llm: LLM, grammar: str, texts: set[str]) -> None:
    answers = llm.generate([[seed] for seed in range(24)], [guided(seed, grammar=grammar) for seed in range(24)])
    assert {answer.outputs[0].text for answer in answers} <= texts
    assert len({answer.outputs[0].text for answer in answers}) > 1


@pytest.mark.parametrize(
    "grammar", ["\n" * 250_000 + "!", "# " * 120_000, 'root ::= "a" ' + '"' * 240_001, "[" * 250_000]
)
def test_no_grammar_is_slow_to_read(grammar: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match="cannot be read"):
        GuidedDecodingParams(grammar=grammar).constraint()
    assert time.process_time() - began < 5


def test_a_grammar_has_a_thousand_rules_at_most() -> None:
    many = "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(1000))
    with pytest.raises(ValueError, match="more than 1000 rules"):
        GuidedDecodingParams(grammar=many).constraint()


@pytest.mark.slow
def test_preempted_sequences_go_on_where_they_were(llm: LLM, tiny_llama: Path) -> None:
    params = [guided(seed, regex="([a-z]{7}-){8}") for seed in range(4)]
    prompts = [[seed] for seed in range(4)]
    cache = KvCacheConfig(max_tokens=144, tokens_per_block=8, enable_block_reuse=False)
    with LLM(
        tiny_llama, dtype="float32", kv_cache_config=cache, max_batch_size=4, max_num_tokens=32, max_seq_len=80,
        enable_iter_perf_stats=True, scheduler_config=SchedulerConfig(capacity_scheduler_policy="MAX_UTILIZATION"),
    ) as cramped:  # fmt: skip
        texts = [output.outputs[0].text for output in cramped.generate(prompts, params)]
        assert sum(step["inflightBatchingStats"]["numPausedRequests"] for step in cramped.get_stats())
    assert all(re.fullmatch("([a-z]{7}-){8}", text) for text in texts)
    assert texts == [output.outputs[0].text for output in llm.generate(prompts, params)]


def test_the_allowed_tokens_of_a_real_vocabulary(smollm2_gguf: Path) -> None:
    """Of 49,152 ids, those whose bytes some text of the language goes on with; a wider model's others are banned."""
    words = ["New York", "New Yorkshire", "Newark", "naïve", "日本"]
    hf = open_checkpoint(smollm2_gguf).load_tokenizer()
    end = hf.convert_tokens_to_ids("<|im_end|>")
    matcher = GrammarCompiler(Tokenizer(hf), 49_200, [end]).start(
        GuidedDecodingParams(regex="|".join(words)).constraint()
    )
    spelling = {chr(code): value for value, code in _byte_letters().items()}
    texts = {
        token: bytes(spelling[letter] for letter in piece)
        for piece, token in hf.get_vocab().items()
        if token not in hf.added_tokens_decoder
    }
    for begun in ("", "New", "New York", "na"):
        at = matcher.copy()
        for token in hf.encode(begun, add_special_tokens=False):
            at.accept(token)
        logits = np.zeros(49_200, np.float32)
        at.restrict(logits, logits.copy())
        rests = [word.encode()[len(begun.encode()) :] for word in words if word.startswith(begun)]
        going_on = {token for token, text in texts.items() if any(text and rest.startswith(text) for rest in rests)}
        allowed = set(np.flatnonzero(logits == 0))
        expected = going_on | ({end} if begun in words else set())
        # Where only one text can follow, only the tokens that it is usually made of may.
        forced = len({rest[:1] for rest in rests}) == 1
        assert allowed <= expected and allowed if forced else allowed == expected


def _byte_letters() -> dict[int, int]:
    """GPT-2's letter of each byte: printable ones stand for themselves, the others follow from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {**{byte: byte for byte in shown}, **{byte: 256 + index for index, byte in enumerate(others)}}


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_device_draws_as_the_host_does(llm: LLM, rows: int) -> None:
    """A bias of zeros changes nothing, but has the host draw: tokens and log-probabilities are the same."""
    wishes = {"regex": "[a-z]{30,60}", "max_tokens": 25, "logprobs": 3, "top_p": 0.9}
    prompts = [[row, 7, row] for row in range(rows)]
    beside = [llm.generate_async([5, row], SamplingParams(max_tokens=30, ignore_eos=True)) for row in range(3)]
    device = llm.generate(prompts, [guided(seed, **wishes) for seed in range(rows)])
    host = llm.generate(prompts, [guided(seed, **wishes, embedding_bias=[0.0] * 258) for seed in range(rows)])
    for one, other in zip(device, host, strict=True):
        found, expected = one.outputs[0], other.outputs[0]
        assert found.token_ids == expected.token_ids
        assert [list(each) for each in found.logprobs] == [list(each) for each in expected.logprobs]
        assert found.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-4)
    for output in beside:
        assert output.result(60).outputs[0].length == 30
