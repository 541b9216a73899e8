"""Tokenizers whose ids are not the model's: tokens that the embedding has no row for, and rows that no token has."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from openai import BadRequestError, OpenAI
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trtllm_jax import LLM, SamplingParams
from trtllm_jax.commands.eval.lm import EngineLM
from trtllm_jax.functional.research import open_model
from trtllm_jax.llmapi import GuidedDecodingParams, KvCacheConfig
from trtllm_jax.llmapi.base_llm import BaseLLM
from trtllm_jax.remote.host import EngineHost
from trtllm_jax.remote.llm import RemoteLLM
from trtllm_jax.serve.app import create_app
from trtllm_jax.serve.settings import ServeSettings
from trtllm_jax.structured.matcher import GrammarCompiler
from trtllm_jax.text.tokenizer import Tokenizer

VOCAB = 258
PAD = VOCAB
TEXT = "ab<pad_me>cd"
SAYS = rf"holds {PAD}, '<pad_me>' of the tokenizer; ids of this model are 0 to {VOCAB - 1}"
SIZES = {"dtype": "float32", "max_batch_size": 2, "max_num_tokens": 32, "max_seq_len": 64}


def load(folder: Path, tokenizer: Any) -> LLM:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    cache = KvCacheConfig(max_tokens=256, tokens_per_block=8)
    return LLM(folder, tokenizer=tokenizer, chat_template=template, kv_cache_config=cache, **SIZES)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    """Its tokenizer ends sequences with a token that was added to it alone, and has one more."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens([AddedToken("<pad_me>", special=False, normalized=False)])
    tokenizer.add_special_tokens({"eos_token": "<new end>"})
    with load(tiny_llama, tokenizer) as llm:
        yield llm


@pytest.fixture(scope="module")
def remote(llm: LLM) -> Iterator[RemoteLLM]:
    host = EngineHost(llm, max_queue_size=4)
    here, there = socket.socketpair()
    host.connect(there)
    remote = RemoteLLM(here, llm.args)
    yield remote
    remote.shutdown()
    host.close()


USES: dict[str, Callable[[BaseLLM], Any]] = {
    "text": lambda llm: llm.generate(TEXT),
    "one of several": lambda llm: llm.generate(["a", {"prompt": TEXT}]),
    "its end": lambda llm: llm.generate("ab" * 40 + TEXT, SamplingParams(truncate_prompt_tokens=4)),
    "prompt log-probabilities": lambda llm: llm.generate(TEXT, SamplingParams(prompt_logprobs=1)),
    "ids": lambda llm: llm.generate([97, PAD]),
    "a chat": lambda llm: llm.chat([{"role": "user", "content": TEXT}]),
    "several chats": lambda llm: llm.chat([[{"role": "user", "content": text}] for text in ("a", TEXT)]),
    "embed": lambda llm: llm.embed(TEXT),
    "a bad word": lambda llm: llm.generate("a", SamplingParams(bad=["b", "<pad_me>"])),
    "bad ids": lambda llm: llm.generate("a", SamplingParams(bad_token_ids=[PAD])),
    "stop ids": lambda llm: llm.generate("a", SamplingParams(stop_token_ids=[1, PAD])),
    "an end": lambda llm: llm.generate("a", SamplingParams(end_id=PAD)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("where", ["llm", "remote"])
def test_a_token_without_a_row_is_refused(where: str, use: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(ValueError, match=SAYS):
        USES[use](request.getfixturevalue(where))


@pytest.mark.slow
def test_what_has_rows_is_answered(llm: LLM) -> None:
    """Also where what is cut off has none, where nothing ends an answer, and where it may not end yet."""
    assert llm.facts.end_ids == {256}, "of generation_config.json; the tokenizer's is not the model's"
    cut = llm.generate(TEXT, SamplingParams(truncate_prompt_tokens=2, max_tokens=3))
    assert cut.prompt_token_ids == llm.tokenizer.encode("cd")
    assert llm.generate("a", SamplingParams(min_tokens=8, max_tokens=8, stop="<pad_me>")).outputs[0].length == 8
    assert llm.generate("a", SamplingParams(end_id=-1, max_tokens=2)).finished


def test_the_server_blames_the_field(llm: LLM, served: Any) -> None:
    message = {"role": "user", "content": TEXT}
    with (
        served(create_app(llm, ServeSettings(model_names=("m",)))) as url,
        OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):

        def tokenize(**body: Any) -> Any:
            return client.with_options(base_url=url).post("/tokenize", body={"model": "m", **body}, cast_to=object)

        asked: list[tuple[str, Callable[[], Any]]] = [
            ("prompt", lambda: client.completions.create(model="m", prompt=TEXT, max_tokens=2)),
            ("prompt", lambda: client.completions.create(model="m", prompt=TEXT, echo=True, logprobs=1, max_tokens=2)),
            ("prompt", lambda: client.completions.create(model="m", prompt=[1, PAD], max_tokens=2)),
            ("messages", lambda: client.chat.completions.create(model="m", messages=[message])),
            ("input", lambda: client.responses.create(model="m", input=TEXT)),
            ("input", lambda: client.embeddings.create(model="m", input=TEXT)),
            ("prompt", lambda: tokenize(prompt=TEXT)),
            (
                "stop_token_ids",
                lambda: client.completions.create(model="m", prompt="a", extra_body={"stop_token_ids": [PAD]}),
            ),
            ("logit_bias", lambda: client.completions.create(model="m", prompt="a", logit_bias={str(PAD): 1})),
        ]
        for param, ask in asked:
            with pytest.raises(BadRequestError, match="ids of this model are 0 to 257") as refused:
                ask()
            assert refused.value.param == param
        assert tokenize(prompt="ab")["tokens"] == llm.tokenizer.encode("ab")


def test_an_evaluation_names_the_token(llm: LLM, tiny_llama: Path) -> None:
    lm = EngineLM(llm, open_model(tiny_llama), 64)
    for pair in ((TEXT, "x"), ("x", TEXT)):
        with pytest.raises(ValueError, match=SAYS):
            lm.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    (text,) = lm.generate_until([Instance("generate_until", {}, ("x", {"until": ["<new end>"], "max_gen_toks": 4}), 0)])
    assert text == llm.generate("x", SamplingParams(max_tokens=4)).outputs[0].text


def byte_tokenizer(*, gap: int = 0) -> PreTrainedTokenizerFast:
    """The bytes and an end; with a gap two further tokens, whose ids are that much higher."""
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    if gap:
        vocab |= {"zz": 257 + gap, "qq": 258 + gap}
    rust = RustTokenizer(models.BPE(vocab={**vocab, "<end>": 256}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<end>")


def test_rows_without_a_token(tiny_llama: Path, served: Any) -> None:
    """An embedding is often padded: its last rows may be drawn, say nothing, and have a name."""
    (a,) = Tokenizer(byte_tokenizer()).encode("a")
    params = SamplingParams(bad_token_ids=list(range(257)), logprobs=2, prompt_logprobs=1, max_tokens=6)
    with load(tiny_llama, byte_tokenizer()) as llm:
        answer = llm.generate([a, 257, a], params).outputs[0]
        assert (answer.token_ids, answer.text) == ([257] * 6, "")
        assert all(257 in entry for entry in [*answer.logprobs, answer.prompt_logprobs[0]])
        guided = GuidedDecodingParams(regex="[ab]{3}")
        assert llm.generate("x", SamplingParams(guided_decoding=guided)).outputs[0].text.strip("ab") == ""
        with (
            served(create_app(llm, ServeSettings(model_names=("m",)))) as url,
            OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
        ):
            forced = {"model": "m", "max_tokens": 2, "logit_bias": {"257": 100}, "temperature": 0}
            choice = client.completions.create(**forced, prompt=[257, a, 257], echo=True, logprobs=2).choices[0]
            assert choice.text == "a"
            assert choice.logprobs.tokens == ["token_id:257", "a", *["token_id:257"] * 3]
            assert choice.logprobs.text_offset == [0, 0, 1, 1, 1]
            chat = client.chat.completions.create(
                **forced, messages=[{"role": "user", "content": "x"}], logprobs=True
            ).choices[0]
            assert chat.message.content == ""
            assert [(entry.token, entry.bytes) for entry in chat.logprobs.content] == [("token_id:257", [])] * 2


@pytest.mark.parametrize("vocab", [258, 300, 400])
def test_a_vocabulary_with_gaps_can_be_guided(vocab: int) -> None:
    """Counting its tokens does not tell its highest id."""
    tokenizer = Tokenizer(byte_tokenizer(gap=100))
    assert (tokenizer.vocab_size, tokenizer.highest_id) == (259, 358)
    compiler = GrammarCompiler(tokenizer, vocab, [256])
    logits = np.zeros(vocab, np.float32)
    compiler.start(GuidedDecodingParams(regex="zz").constraint()).restrict(logits, logits.copy())
    allowed = np.flatnonzero(logits == 0).tolist()
    assert allowed == tokenizer.encode("z")
