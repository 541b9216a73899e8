"""The growing text against the tokenizer's own decoding of everything at once, and stop strings against brute force."""

import functools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from checkpoints.checkpoint import open_checkpoint
from trtllm_jax.text.detokenizer import IncrementalDetokenizer, anchor_of
from trtllm_jax.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not care.",
    "Der schnelle braune Fuchs springt über den faulen Hund – ganz ohne Mühe.",
    "人工智能正在改变世界。模型的推理需要高效的计算。",
    "日本語のテキストも、ひらがなとカタカナがあります。",
    "Привет, мир! Как дела сегодня?",
    "def f(x):\n    return {'a': x + 1}\n\n\n# 🦙🚀👩‍👩‍👧 done",
]
SPECIAL = [AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>", "<|im_end|>")]
PLAIN_ADDED = AddedToken("<tool call>", special=False, normalized=False)
MULTILINGUAL = "Hello 世界 🦙, naïve café — привет\n\nदुनिया 👩‍👩‍👧!"


def _wrap(rust: RustTokenizer) -> Tokenizer:
    rust.add_tokens([PLAIN_ADDED])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="</s>"))


def _byte_level() -> Tokenizer:
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return _wrap(rust)


def _sentencepiece(decoder: decoders.Decoder) -> Tokenizer:
    rust = RustTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    rust.decoder = decoder
    special = ["<unk>", *(token.content for token in SPECIAL)]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    # Trained on a part, so that characters of the rest take the byte fallback.
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=[*special, *fallback, "\ufffd"])
    rust.train_from_iterator(CORPUS[:3], trainer)
    record = json.loads(rust.to_str())
    # The trainer makes all it was given special; in real models byte tokens are ordinary.
    record["added_tokens"] = [token for token in record["added_tokens"] if token["content"] in special]
    return _wrap(RustTokenizer.from_str(json.dumps(record)))


LLAMA_DECODER = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]
BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": _byte_level,
    "llama": lambda: _sentencepiece(decoders.Sequence(LLAMA_DECODER)),
    "gemma": lambda: _sentencepiece(decoders.Sequence(LLAMA_DECODER[:-1])),
    "metaspace": lambda: _sentencepiece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
}


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return BUILDERS[kind]()


kinds = pytest.mark.parametrize("kind", BUILDERS)


def feed(detokenizer: IncrementalDetokenizer, ids: Sequence[int], group: int = 1) -> list[str]:
    chunks = [detokenizer.append(ids[i : i + group]) for i in range(0, len(ids), group)]
    return [*chunks, detokenizer.finish()]


@st.composite
def id_sequences(draw: st.DrawFn, kind: str) -> list[int]:
    """Encoded text cut anywhere, mixed with arbitrary ids: special ones, stray bytes, ids outside the vocabulary."""
    tokenizer = tokenizer_of(kind)
    text = st.one_of(st.text(max_size=12), st.sampled_from([*CORPUS, MULTILINGUAL]))
    encoded = text.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    cut = st.builds(lambda ids, start, stop: ids[start:][:stop], encoded, st.integers(0, 9), st.integers(0, 40))
    arbitrary = st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=8)
    parts = draw(st.lists(st.one_of(cut, arbitrary), max_size=5))
    return [token_id for part in parts for token_id in part]


def brute_force(
    tokenizer: Tokenizer, ids: list[int], stops: Sequence[str], include: bool
) -> tuple[str, str | None, int | None]:
    """The same answer from decoding every beginning of ``ids`` anew; U+FFFD at its end may yet become a character."""
    for seen in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:seen])
        if seen < len(ids):
            text = text.rstrip("\ufffd")
        for end in range(1, len(text) + 1):
            ending = [stop for stop in stops if text[:end].endswith(stop)]
            if ending:
                stop = max(ending, key=len)
                count = next(k for k in range(seen + 1) if tokenizer.decode(ids[:k]).startswith(text[:end]))
                return text[: end if include else end - len(stop)], stop, count
    return tokenizer.decode(ids), None, None


@kinds
@given(data=st.data(), skip_special_tokens=st.booleans(), group=st.integers(1, 5))
def test_text_equals_decoding_everything_at_once(
    kind: str, data: st.DataObject, skip_special_tokens: bool, group: int
) -> None:
    tokenizer, ids = tokenizer_of(kind), data.draw(id_sequences(kind))
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    chunks = feed(detokenizer, ids, group)
    assert detokenizer.text == "".join(chunks) == tokenizer.decode(ids, skip_special_tokens)
    assert detokenizer.stopped is None
    assert detokenizer.num_tokens_at_stop is None


def test_text_equals_decoding_everything_at_once_with_a_real_vocabulary(smollm2_gguf: Path) -> None:
    tokenizer = Tokenizer(open_checkpoint(smollm2_gguf).load_tokenizer())
    rng = random.Random(0)
    written = [tokenizer.encode(text)[:cut] for text in [*CORPUS, MULTILINGUAL] for cut in range(40)]
    arbitrary = [rng.choices(range(tokenizer.vocab_size + 5), k=20) for _ in range(300)]
    for ids in [*written, *arbitrary]:
        detokenizer = IncrementalDetokenizer(tokenizer)
        feed(detokenizer, ids)
        assert detokenizer.text == tokenizer.decode(ids)


@kinds
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_a_text_that_goes_on_is_joined_as_the_tokenizer_joins_it(kind: str, skip_special_tokens: bool) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("<s>The quick</s> 世界 fox<tool call>\n🦙, naïve café — привет dog<s> the")
    befores = {border: tokenizer.decode(ids[:border], skip_special_tokens) for border in range(len(ids))}
    whole = {border: text for border, text in befores.items() if "\ufffd" not in text}
    assert len(whole) > 20
    for border, before in whole.items():
        after = anchor_of(tokenizer, ids[:border], skip_special_tokens)
        detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens, after=after)
        feed(detokenizer, ids[border:])
        assert before + detokenizer.text == tokenizer.decode(ids, skip_special_tokens)


@kinds
@given(data=st.data(), include_stop=st.booleans(), group=st.integers(1, 5))
def test_stop_strings_cut_where_brute_force_cuts(
    kind: str, data: st.DataObject, include_stop: bool, group: int
) -> None:
    tokenizer, ids = tokenizer_of(kind), data.draw(id_sequences(kind))
    full = tokenizer.decode(ids)
    anywhere = st.text(min_size=1, max_size=3)
    if full:
        slices = st.builds(lambda start, size: full[start:][:size], st.integers(0, len(full) - 1), st.integers(1, 6))
        anywhere = st.one_of(slices, anywhere)
    stops = tuple(data.draw(st.lists(anywhere, min_size=1, max_size=3)))
    detokenizer = IncrementalDetokenizer(tokenizer, stop=stops, include_stop=include_stop)
    chunks = feed(detokenizer, ids, group)
    assert "".join(chunks) == detokenizer.text
    found = (detokenizer.text, detokenizer.stopped, detokenizer.num_tokens_at_stop)
    assert found == brute_force(tokenizer, ids, stops, include_stop)


@kinds
def test_no_chunk_of_valid_text_holds_half_a_character(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    chunks = feed(IncrementalDetokenizer(tokenizer), tokenizer.encode(MULTILINGUAL))
    assert "".join(chunks) == tokenizer.decode(tokenizer.encode(MULTILINGUAL))
    assert not any("\ufffd" in chunk for chunk in chunks)
    assert sum(map(bool, chunks)) > 10


def test_a_character_is_shown_with_its_last_byte() -> None:
    tokenizer = tokenizer_of("byte level")
    ids = tokenizer.encode("𐍈")
    assert len(ids) == 4
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.append([token_id]) for token_id in ids] == ["", "", "", "𐍈"]


@kinds
def test_every_token_of_plain_text_is_shown_at_once(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("The quick brown fox")
    detokenizer = IncrementalDetokenizer(tokenizer, stop=("\x00",))
    for length in range(1, len(ids) + 1):
        detokenizer.append([ids[length - 1]])
        assert detokenizer.text == tokenizer.decode(ids[:length])


def test_a_special_token_between_words_keeps_the_space_after_it() -> None:
    tokenizer = tokenizer_of("llama")
    end = tokenizer.encode("</s>", add_special_tokens=False)
    ids = [*tokenizer.encode("The quick"), *end, *tokenizer.encode("The quick")]
    chunks = feed(IncrementalDetokenizer(tokenizer), ids)
    assert "".join(chunks) == "The quick The quick"


def test_what_may_begin_a_stop_string_is_held_until_resolved() -> None:
    tokenizer = tokenizer_of("byte level")
    detokenizer = IncrementalDetokenizer(tokenizer, stop=("###",))
    assert [detokenizer.append(tokenizer.encode(text)) for text in ("a#", "#", "b", "##", "#c")] == [
        "a", "", "##b", "", "",
    ]  # fmt: skip
    assert detokenizer.stopped == "###"
    assert detokenizer.text == "a##b"
    assert detokenizer.append(tokenizer.encode("more")) == ""
    assert detokenizer.finish() == ""


def test_held_text_is_released_at_the_end() -> None:
    tokenizer = tokenizer_of("byte level")
    detokenizer = IncrementalDetokenizer(tokenizer, stop=("###",))
    assert detokenizer.append(tokenizer.encode("a##")) == "a"
    assert detokenizer.finish() == "##"
    assert detokenizer.stopped is None


@pytest.mark.parametrize(("text", "stop"), [("The\n", "\n"), ("The\n", "e\n"), ("The\n\n", "\n\n"), ("The\n🦙", "🦙")])
def test_a_byte_that_completes_a_stop_string_stops_at_once(text: str, stop: str) -> None:
    tokenizer = tokenizer_of("llama")
    ids = tokenizer.encode(text)
    assert tokenizer.piece(ids[-1]).byte is not None
    detokenizer = IncrementalDetokenizer(tokenizer, stop=(stop,))
    detokenizer.append([*ids, *ids])
    assert detokenizer.text == text.removesuffix(stop)
    assert (detokenizer.stopped, detokenizer.num_tokens_at_stop) == (stop, len(ids))


def test_a_stop_string_completed_by_an_incomplete_character_stops_at_the_end() -> None:
    tokenizer = tokenizer_of("byte level")
    ids = tokenizer.encode("ab🦙")[:-1]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=("b\ufffd",))
    assert [detokenizer.append(ids), detokenizer.finish()] == ["a", ""]
    assert (detokenizer.stopped, detokenizer.num_tokens_at_stop) == ("b\ufffd", 3)


@pytest.mark.parametrize(("include_stop", "text"), [(False, "a##"), (True, "a##<|im_end|>")])
def test_a_skipped_special_token_can_be_a_stop_string(include_stop: bool, text: str) -> None:
    tokenizer = tokenizer_of("byte level")
    ids = tokenizer.encode("a##<|im_end|>b")
    detokenizer = IncrementalDetokenizer(tokenizer, stop=("###", "<|im_end|>"), include_stop=include_stop)
    assert "".join(feed(detokenizer, ids)) == detokenizer.text == text
    assert (detokenizer.stopped, detokenizer.num_tokens_at_stop) == ("<|im_end|>", len(ids) - 1)


class _Counting(Tokenizer):
    decoded = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize("garbage", [False, True])
@kinds
def test_cost_is_constant_per_token(kind: str, garbage: bool) -> None:
    counting = _Counting(tokenizer_of(kind).hf)
    ids = counting.encode(MULTILINGUAL) * 40
    if garbage:  # never a whole character: what a tokenizer's own stream would decode again and again
        stray = [token_id for token_id in range(counting.vocab_size) if counting.piece(token_id).text == "\ufffd"]
        ids = random.Random(0).choices(stray, k=2000)
    for token_id in set(ids):
        counting.piece(token_id)
    counting.decoded = 0
    feed(IncrementalDetokenizer(counting), ids)
    assert counting.decoded <= 7 * len(ids)
