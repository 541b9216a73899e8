"""Log-probabilities over HTTP: what tokens are called and where they are, for tokenizers of every kind.

The answers are given ones, by an `LLM` whose engine plays them, with random logits; everything else is real.
"""

import random
import re
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from openai import OpenAI
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from trtllm_jax.engine.logit_edits import top_logprobs
from trtllm_jax.engine.request import FinishReason, Request, TokenLogprobs, Update
from trtllm_jax.llmapi.base_llm import BaseLLM
from trtllm_jax.requests.builder import EngineFacts
from trtllm_jax.requests.output_processor import deliver
from trtllm_jax.serve.app import create_app
from trtllm_jax.serve.settings import ServeSettings
from trtllm_jax.serve.token_texts import TokenPosition, TokenTexts
from trtllm_jax.text.chat import Chat
from trtllm_jax.text.tokenizer import Tokenizer

CORPUS = ["the cat sat on the mat", "the true cat sat, on the mat. true!", "a naive cafe is the best of all cats"]
SPECIAL = [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>", "<|sep|>")]
PLAIN_ADDED = AddedToken("<tool call>", special=False, normalized=False)
MULTILINGUAL = "the cat\nsat: 世界 🦙, naïve café — привет"
PADDING = 5
"""Rows of the model that the tokenizer knows no id for."""


def _finished(rust: RustTokenizer) -> Tokenizer:
    rust.add_special_tokens(SPECIAL)
    rust.add_tokens([PLAIN_ADDED])
    hf = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    hf.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return Tokenizer(hf)


def _byte_level(trim_offsets: bool) -> Tokenizer:
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    rust.train_from_iterator([*CORPUS, MULTILINGUAL], trainer)
    rust.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return _finished(rust)


def _with_bos(rust: RustTokenizer) -> Tokenizer:
    tokenizer = _finished(rust)
    bos = tokenizer.hf.bos_token_id
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return _finished(rust)


def _sentencepiece(leading_space: bool) -> Tokenizer:
    """As in Llama 2, or Gemma: a space is part of the word after it, and characters without a token are bytes."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *fallback, "▁", *"abcdefghijklmnopqrstuvwxyz.,!:"])
    }
    merges = []
    for word in ("the", "cat", "sat", "on", "mat", "true"):
        for spelling in ("▁" + word, word):
            for end in range(2, len(spelling) + 1):
                if (pair := (spelling[: end - 1], spelling[end - 1])) not in merges:
                    merges.append(pair)
                vocab.setdefault(spelling[:end], len(vocab))
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    prepended, stripped = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if leading_space else ([], [])
    rust.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped])
    return _with_bos(rust)


def _unigram() -> Tokenizer:
    rust = RustTokenizer(models.Unigram())
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    rust.train_from_iterator([*CORPUS, MULTILINGUAL], trainer)
    return _finished(rust)


def _wordpiece() -> Tokenizer:
    rust = RustTokenizer(models.WordPiece(unk_token="<unk>"))
    rust.normalizer = normalizers.BertNormalizer(lowercase=True)
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=110, special_tokens=["<unk>"], show_progress=False)
    rust.train_from_iterator([*CORPUS, MULTILINGUAL], trainer)
    return _with_bos(rust)


BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": lambda: _byte_level(False),
    "byte level, offsets without spaces": lambda: _byte_level(True),
    "llama": lambda: _sentencepiece(True),
    "gemma": lambda: _sentencepiece(False),
    "unigram": _unigram,
    "wordpiece": _wordpiece,
}
kinds = pytest.mark.parametrize(
    "kind",
    [kind if kind in ("byte level", "llama") else pytest.param(kind, marks=pytest.mark.slow) for kind in BUILDERS],
)
TEXTS = {"wordpiece": "the cats, sat", "unigram": "the cat sat: naïve"}
"""Whose tokens have exactly this text; for the other kinds any text will do."""


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return BUILDERS[kind]()


class PlayedLLM(BaseLLM):
    """An `LLM` without an engine: its answers are those of `answers`, in turn, one token a step."""

    failure = None

    def __init__(self, tokenizer: Tokenizer, answers: Sequence[Sequence[int]]) -> None:
        vocab = tokenizer.vocab_size + PADDING
        self._answers, self._vocab, self._rng = answers, vocab, np.random.default_rng(0)
        self._ended: set[int] = set()
        ends = frozenset(tokenizer.eos_ids)
        facts = EngineFacts(vocab, ends, 8, 4096, None, 1, batched_processor=False, model_type="")
        self._connect(tokenizer, Chat(tokenizer), facts, self)

    def submit(self, requests: Sequence[Request]) -> None:
        threading.Thread(target=self._play, args=(requests,)).start()

    def finish(self, request: Request, reason: FinishReason) -> None:
        self._ended.add(id(request))

    def refuse_own_thread(self) -> None:
        """No thread of its own waits."""

    def _play(self, requests: Sequence[Request]) -> None:
        for number, request in enumerate(requests):
            tokens = list(self._answers[number % len(self._answers)])
            context = [self._logits() for _ in request.prompt] if "context_logits" in request.reports else []
            deliver([Update(request, outputs={"context_logits": [logits]}) for logits in context[:-1]])
            for place, token in enumerate(tokens):
                if id(request) in self._ended:
                    break
                stops = token in request.stop_ids
                ends = place + 1 == min(len(tokens), request.max_tokens)
                finish = FinishReason.STOP if stops else FinishReason.LENGTH if ends else None
                logits = context[-1] if context and place == 0 else self._logits()
                entry = self._entry(logits, token, request.num_logprobs)
                outputs = {"logprobs": entry, "context_logits": [] if place else context[-1:]}
                deliver([Update(request, [token], finish, outputs=outputs)])
                if finish:
                    break

    def _logits(self) -> np.ndarray:
        return self._rng.normal(size=self._vocab).astype(np.float32)

    def _entry(self, logits: np.ndarray, token: int, count: int | None) -> list[TokenLogprobs]:
        if count is None:
            return []
        top, own, rank = top_logprobs(logits, count, token)
        return [TokenLogprobs(token, own, rank, tuple(top))]

    def get_stats(self, timeout: float | None = 2) -> list[Any]:
        return []

    def get_kv_cache_events(self, timeout: float | None = 2) -> list[Any]:
        return []

    def get_kv_cache_capacity(self) -> dict[str, int]:
        return {}


@pytest.fixture
def playing(served: Any) -> Callable[..., Any]:
    """(tokenizer, *answers) -> a client of a server that gives those."""
    opened = []

    def play(tokenizer: Tokenizer, *answers: Sequence[int]) -> OpenAI:
        context = served(create_app(PlayedLLM(tokenizer, answers), ServeSettings(model_names=("m",))))
        opened.append(context)
        return OpenAI(base_url=f"{context.__enter__()}/v1", api_key="none", max_retries=0, timeout=60)

    yield play
    for context in opened:
        context.__exit__(None, None, None)


def complete(client: OpenAI, *, stream: bool = False, **ask: Any) -> dict[int, dict[str, Any]]:
    """The choices with their log-probabilities; of a stream what the events add up to."""
    ask = {"model": "m", "max_tokens": 100, "logprobs": 3, **ask}
    answer = client.completions.create(**ask, stream=stream)
    found: dict[int, dict[str, Any]] = {}
    for event in answer if stream else [answer]:
        for choice in event.choices:
            one = found.setdefault(
                choice.index, {"text": "", "token_logprobs": [], "top_logprobs": [], "tokens": [], "text_offset": []}
            )
            one["text"] += choice.text
            one["finish"] = choice.finish_reason
            for name, values in choice.logprobs.model_dump().items() if choice.logprobs else ():
                one[name] += values
    return found


def bytes_of(name: str) -> bytes:
    """What a token's name says, as OpenAI's own clients read it."""
    if not name.startswith("bytes:"):
        return name.encode()
    return re.sub(rb"\\x(..)", lambda match: bytes([int(match[1], 16)]), name.removeprefix("bytes:").encode())


def check(choice: dict[str, Any], hidden: Sequence[str] = ()) -> None:
    """The tokens spell the text and are where they say; `hidden` are the names of those that it does not show."""
    text, shown = choice["text"], [name for name in choice["tokens"] if name not in hidden]
    assert b"".join(map(bytes_of, shown)).decode() == text
    check_offsets(choice, hidden)


def check_offsets(choice: dict[str, Any], hidden: Sequence[str] = ()) -> None:
    text = choice["text"]
    assert choice["text_offset"] == sorted(choice["text_offset"])
    for name, offset, top, own in zip(
        choice["tokens"], choice["text_offset"], choice["top_logprobs"], choice["token_logprobs"], strict=True
    ):
        assert 0 <= offset <= len(text)
        if name not in hidden and not name.startswith("bytes:"):
            assert text.startswith(name, offset), (name, text[offset:])
        assert top is None or top[name] == own


@kinds
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("given", ["text", "ids"])
def test_tokens_spell_the_text(kind: str, echo: bool, given: str, playing: Any) -> None:
    tokenizer = tokenizer_of(kind)
    text = TEXTS.get(kind, MULTILINGUAL)
    ids = tokenizer.encode(text)
    answer = tokenizer.encode(TEXTS.get(kind, "true cat 世界\nsat."), add_special_tokens=False)
    client = playing(tokenizer, answer)
    ask = {"prompt": text if given == "text" else ids, "echo": echo}
    (whole,) = complete(client, **ask).values()
    check(whole, hidden=["<s>"])
    expected = tokenizer.decode([*ids, *answer] if echo else answer)
    assert whole["text"] == expected
    assert len(whole["tokens"]) == len(answer) + echo * len(ids)
    (streamed,) = complete(client, **ask, stream=True).values()
    names = ("text", "tokens", "text_offset", "finish")
    assert [streamed[name] for name in names] == [whole[name] for name in names]
    (shown,) = complete(client, **ask, extra_body={"skip_special_tokens": False}).values()
    if given == "ids":
        check(shown)


@kinds
def test_every_alternative_is_told_under_its_own_name(kind: str, playing: Any) -> None:
    """Twenty of some hundred random ids: special ones, parts of characters, ids that no token has, equal texts."""
    tokenizer = tokenizer_of(kind)
    answer = random.Random(1).choices(range(tokenizer.vocab_size + PADDING), k=60)
    client = playing(tokenizer, answer)
    ask = {"extra_body": {"ignore_eos": True}, "max_tokens": 60, "seed": 1}
    (choice,) = complete(client, prompt="the", logprobs=20, **ask).values()
    assert len(choice["top_logprobs"]) == 60
    for name, own, top in zip(choice["tokens"], choice["token_logprobs"], choice["top_logprobs"], strict=True):
        assert top[name] == own
        assert len(top) == 20 + (own < sorted(top.values())[-20])
    messages = [{"role": "user", "content": "the"}]
    chat = client.chat.completions.create(model="m", messages=messages, logprobs=True, top_logprobs=20, **ask)
    for entry in chat.choices[0].logprobs.content:
        assert len({one.token for one in entry.top_logprobs}) == 20
        assert all(
            one.token != entry.token
            or one == entry.model_copy(update={"top_logprobs": None})
            or (one.logprob, one.bytes) == (entry.logprob, entry.bytes)
            for one in entry.top_logprobs
        )


@pytest.mark.parametrize("kind", ["llama", "gemma", "byte level"])
def test_pieces_that_differ_have_different_names_within_a_text(kind: str) -> None:
    """Behind other text a name tells everything but bytes that stand for a character which has a token of its own."""
    tokenizer = tokenizer_of(kind)
    texts = TokenTexts(tokenizer)
    place = TokenPosition(tokenizer.encode("a", add_special_tokens=False)[-1])
    ids = [i for i in range(tokenizer.vocab_size + PADDING) if tokenizer.piece(i).byte is None]
    assert len({texts.name(token, place) for token in ids}) == len(ids)
    assert len(texts.names(range(tokenizer.vocab_size + PADDING), place)) == tokenizer.vocab_size + PADDING


def test_parts_of_characters_are_named_as_openai_names_them() -> None:
    texts = TokenTexts(tokenizer_of("llama"))
    half, line, letter = texts.tokenizer.hf.convert_tokens_to_ids(["<0xE2>", "<0x0A>", "<0x61>"])
    assert [texts.name(token, TokenPosition(None)) for token in (half, line, letter)] == ["bytes:\\xe2", "\n", "a"]
    plain = texts.tokenizer.hf.convert_tokens_to_ids("a")
    assert list(texts.names([plain, letter], TokenPosition(half)).values()) == ["a", f"token_id:{letter}"]
    assert TokenTexts(None).name(7, TokenPosition(None)) == "token_id:7"


@kinds
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("skip", [True, False])
def test_special_and_unknown_tokens_within_an_answer(kind: str, stream: bool, skip: bool, playing: Any) -> None:
    tokenizer = tokenizer_of(kind)
    words = tokenizer.encode("the cat", add_special_tokens=False)
    sep, added = tokenizer.hf.convert_tokens_to_ids(["<|sep|>", "<tool call>"])
    unknown = tokenizer.vocab_size + 2
    answer = [sep, *words, sep, added, unknown, *words]
    client = playing(tokenizer, answer)
    extra = {"skip_special_tokens": skip}
    (choice,) = complete(client, prompt="the", echo=True, stream=stream, extra_body=extra).values()
    check(choice, hidden=["<s>", f"token_id:{unknown}", *(["<|sep|>"] if skip else [])])
    assert choice["text"] == "the" + tokenizer.text_behind(words[0], [i for i in answer if i != sep or not skip])
    message, content = chatted(client, stream, **extra)
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == message
    assert message == tokenizer.decode(answer, skip_special_tokens=skip)


def chatted(client: OpenAI, stream: bool, **extra: Any) -> tuple[str, list[Any]]:
    """A chat's text and log-probabilities."""
    answer = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "the"}], logprobs=True, max_tokens=100, stream=stream,
        extra_body=extra,
    )  # fmt: skip
    if not stream:
        choice = answer.choices[0]
        return choice.message.content, choice.logprobs.content
    choices = [choice for event in answer for choice in event.choices]
    logprobs = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    return "".join(choice.delta.content or "" for choice in choices), logprobs


@kinds
@pytest.mark.parametrize("stream", [False, True])
def test_the_bytes_of_a_chat_are_its_text(kind: str, stream: bool, playing: Any) -> None:
    tokenizer = tokenizer_of(kind)
    text = TEXTS.get(kind, MULTILINGUAL)
    answer = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_ids[0]]
    client = playing(tokenizer, answer)
    message, content = chatted(client, stream)
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == message == text
    assert b"".join(bytes_of(entry.token) for entry in content).decode() == text
    response = client.responses.create(
        model="m", input="the", include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=100
    )
    (part,) = response.output[0].content
    assert bytes(byte for entry in part.logprobs for byte in entry.bytes).decode() == part.text == text


@pytest.mark.parametrize("kind", ["byte level", "llama"])
def test_any_bytes_have_places(kind: str, playing: Any) -> None:
    """Ids drawn at random: halves of characters, stray bytes, everything."""
    tokenizer = tokenizer_of(kind)
    draw = random.Random(2)
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.piece(i).byte is None]
    for _ in range(5):
        answer = draw.choices(ids, k=80)
        client = playing(tokenizer, answer)
        (whole,) = complete(client, prompt=ids[20:30], echo=True, extra_body={"ignore_eos": True}).values()
        hidden = [token.content for token in SPECIAL]
        check_offsets(whole, hidden)
        token_bytes = b"".join(bytes_of(name) for name in whole["tokens"] if name not in hidden)
        assert len(token_bytes.decode(errors="replace")) == len(whole["text"])
        (streamed,) = complete(
            client, prompt=ids[20:30], echo=True, stream=True, extra_body={"ignore_eos": True}
        ).values()
        assert [streamed[name] for name in ("text", "tokens", "text_offset")] == [
            whole[name] for name in ("text", "tokens", "text_offset")
        ]


@pytest.mark.parametrize("kind", ["byte level", "llama"])
def test_the_parts_of_a_character_are_where_it_begins(kind: str, playing: Any) -> None:
    tokenizer = tokenizer_of(kind)
    answer = tokenizer.encode("a🦊\n🦊b", add_special_tokens=False)
    (choice,) = complete(playing(tokenizer, answer), prompt="the").values()
    offsets = dict(zip(choice["text_offset"], choice["tokens"], strict=True))
    assert sorted(set(choice["text_offset"])) == list(range(len(choice["text"]))) == list(range(5))
    parts = len(tokenizer.encode("\n🦊", add_special_tokens=False)) - len(
        tokenizer.encode("\n", add_special_tokens=False)
    )
    assert parts > 1
    assert [choice["text_offset"].count(place) for place in (1, 3)] == [parts, parts]
    assert offsets[4] == "b"


@kinds
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_where_a_stop_string_cuts(kind: str, stream: bool, include: bool, playing: Any) -> None:
    """The tokens that complete it are told, as in TensorRT-LLM; all others spell the text."""
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer.encode("the cat")
    answer = tokenizer.encode("sat on the mat", add_special_tokens=False)
    whole = tokenizer.decode([*prompt, *answer])
    client = playing(tokenizer, answer)
    ask = {"prompt": prompt, "echo": True, "stop": ["on"], "stream": stream}
    (choice,) = complete(client, **ask, extra_body={"include_stop_str_in_output": include}).values()
    upto = whole.index("on")
    assert choice["text"] == whole[: upto + 2 * include]
    spelled = b"".join(bytes_of(name) for name in choice["tokens"] if name != "<s>").decode()
    assert spelled == whole[: upto + 2]
    for name, offset in zip(choice["tokens"], choice["text_offset"], strict=True):
        assert name == "<s>" or spelled.startswith(name, offset)


@kinds
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_the_token_that_ends_an_answer_is_counted(kind: str, stream: bool, echo: bool, playing: Any) -> None:
    """Clients that score a text cut the one generated token off, whatever it is."""
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer.encode("the cat")
    words = tokenizer.encode("sat", add_special_tokens=False)
    end, stop = tokenizer.eos_ids[0], tokenizer.encode("on", add_special_tokens=False)[-1]
    client = playing(tokenizer, [end], [*words, end], [*words, stop], words)
    found = complete(
        client, prompt=prompt, n=4, echo=echo, stream=stream, temperature=1.0, extra_body={"stop_token_ids": [stop]}
    )
    for index, drawn in enumerate(([end], [*words, end], [*words, stop], words)):
        choice = found[index]
        assert len(choice["tokens"]) == len(choice["token_logprobs"]) == len(drawn) + len(prompt) * echo
        assert len(choice["top_logprobs"]) == len(choice["text_offset"]) == len(choice["tokens"])
        assert all(value is not None for value in choice["token_logprobs"][1:])
        assert choice["text"] == tokenizer.decode(
            [*prompt, *drawn[: len(drawn) - (index < 3)]] if echo else drawn[: len(drawn) - (index < 3)]
        )
        assert (choice["tokens"][-1] == "</s>") == (index < 2)
        assert choice["finish"] == ("stop" if index < 3 else "length")


def test_a_prompt_that_the_tokenizer_changes_is_echoed_as_it_was_given(playing: Any) -> None:
    tokenizer = tokenizer_of("wordpiece")
    text = "The  CAT\n mat, Café"
    client = playing(tokenizer, tokenizer.encode("sat", add_special_tokens=False))
    (choice,) = complete(client, prompt=text, echo=True).values()
    assert choice["text"] == text + " sat"
    spans = tokenizer.hf.backend_tokenizer.encode(text).offsets
    for name, offset, (start, end) in zip(choice["tokens"], choice["text_offset"], spans, strict=False):
        assert offset in (start, start - 1) or start == end
        assert choice["text"][offset:end].strip().lower().startswith(name.strip()[:3]) or start == end


def test_no_text_no_places(playing: Any) -> None:
    tokenizer = tokenizer_of("llama")
    client = playing(tokenizer, tokenizer.encode("true", add_special_tokens=False))
    (choice,) = complete(client, prompt="the cat", echo=True, extra_body={"detokenize": False}).values()
    assert (choice["text"], set(choice["text_offset"])) == ("", {0})
    assert choice["tokens"] == ["<s>", "the", " cat", " true"]


@pytest.mark.parametrize("stream", [False, True])
def test_scoring_alone_tells_the_prompt_and_nothing_else(stream: bool, playing: Any) -> None:
    tokenizer = tokenizer_of("llama")
    client = playing(tokenizer, tokenizer.encode("true", add_special_tokens=False))
    (choice,) = complete(client, prompt="the cat", echo=True, max_tokens=0, stream=stream).values()
    assert (choice["text"], choice["tokens"]) == ("the cat", ["<s>", "the", " cat"])
    check(choice, hidden=["<s>"])
