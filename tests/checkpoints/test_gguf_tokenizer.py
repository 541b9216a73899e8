from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from checkpoints.gguf_file import GgufFile
from checkpoints.gguf_tokenizer import load_tokenizer

WriteGguf = Callable[..., Path]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

TEXTS = (
    "Hello, my name is",
    "The year 2024 had 366 days, 12345678 of something: 3.14159 and 1e-10.",
    "你好，世界！今天天气怎么样？",  # noqa: RUF001
    "Grüße, naïve café — “quotes” … ĀāĒē Ω≈ç√ Привет мир こんにちは 안녕하세요",
    "👍🏽 🙂 👨‍👩‍👧‍👦 flags 🇨🇭",
    "def f(x):\n\treturn {k: v for k, v in x.items()}  # it's\n\n\n    pass\n",
    "   leading, trailing and  double   spaces   ",
    "\n\n\t \r\n mixed \u00a0 whitespace \u2003 runs\n",
    "I'll, we've, they're, don't, IT'S, CAN'T, y'all'd",
    "camelCaseWords HTTPServer iPhone snake_case_words x+=1; y**=2 <|not_a_token|>",
    "٣٤٥ ½ Ⅷ ² a1b2c3",
    "",
)


# -- byte-level BPE, on a vocabulary trained here -----------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_level() -> Mapping[str, Any]:
    """The metadata of a small byte-level BPE tokenizer with a control and a user-defined token at its start."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=800,
        special_tokens=["<|begin|>", "<|end|>", "<think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [*TEXTS, "1234567890 " * 20, "12 123 1234 2024 " * 20, "hello'S IT'S WE'VE don't " * 9, "...--- ==> " * 9]
    tokenizer.train_from_iterator(corpus, trainer)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [f"{left} {right}" for left, right in trained_merges(tokenizer)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def trained_merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(GgufFile(path))


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "smaug-bpe", "qwen2", "tekken"])
def test_text_is_split_as_transformers_splits_it(
    pre: str, byte_level: Mapping[str, Any], write_gguf: WriteGguf
) -> None:
    # llama.cpp's rules on merges and the first token are not in transformers: compare the rest.
    path = write_gguf(metadata={**byte_level, "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False})
    ours = tokenizer_of(path)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["year", "Ġ", "2", "0", "2", "4", "!!", "Ġ", "1", "a"]),
        ("default", ["year", "Ġ", "202", "4", "!!", "Ġ", "1", "a"]),
        ("gpt-2", ["year", "Ġ2024", "!!", "Ġ1", "a"]),
        ("llama-bpe", ["year", "Ġ", "202", "4", "!!", "Ġ", "1", "a"]),
        ("qwen2", ["year", "Ġ", "2", "0", "2", "4", "!!", "Ġ", "1", "a"]),
    ],
)
def test_numbers_are_where_pre_tokenisers_differ(
    pre: str, pieces: list[str], byte_level: Mapping[str, Any], write_gguf: WriteGguf
) -> None:
    tokenizer = tokenizer_of(write_gguf(metadata={**byte_level, "tokenizer.ggml.pre": pre}))
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("year 2024!! 1a")
    assert [piece for piece, _ in split] == pieces


def test_a_llama_3_vocabulary_starts_every_text_and_takes_whole_words(
    byte_level: Mapping[str, Any], write_gguf: WriteGguf
) -> None:
    word = "Ġzyxwvut"  # a token that no merges lead to
    size = len(byte_level["tokenizer.ggml.tokens"])
    metadata = {
        **byte_level,
        "tokenizer.ggml.tokens": [*byte_level["tokenizer.ggml.tokens"], word],
        "tokenizer.ggml.token_type": [*byte_level["tokenizer.ggml.token_type"], NORMAL],
    }
    llama3 = tokenizer_of(write_gguf(metadata={**metadata, "tokenizer.ggml.pre": "llama-bpe"}))
    assert llama3.encode(" zyxwvut") == [0, size]
    smaug = tokenizer_of(write_gguf(metadata={**metadata, "tokenizer.ggml.pre": "smaug-bpe"}))
    assert len(smaug.encode(" zyxwvut")) > 2
    assert 0 not in smaug.encode(" zyxwvut")


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_metadata_decides_how_a_text_starts_and_ends(
    bos: bool, eos: bool, byte_level: Mapping[str, Any], write_gguf: WriteGguf
) -> None:
    flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    tokenizer = tokenizer_of(write_gguf(metadata={**byte_level, "tokenizer.ggml.pre": "gpt-2", **flags}))
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("Hello") == [0] * bos + plain + [1] * eos


def test_special_and_user_defined_tokens_stay_whole(byte_level: Mapping[str, Any], write_gguf: WriteGguf) -> None:
    tokenizer = tokenizer_of(write_gguf(metadata={**byte_level, "tokenizer.ggml.pre": "gpt-2"}))
    ids = tokenizer.encode("<|begin|>Hello<think> it's<|end|>")
    assert (ids[0], ids[-1], ids.count(2)) == (0, 1, 1)
    assert tokenizer.decode(ids) == "<|begin|>Hello<think> it's<|end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello<think> it's"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, None)
    assert len(tokenizer) == len(byte_level["tokenizer.ggml.tokens"])


def test_the_chat_template_comes_along(byte_level: Mapping[str, Any], write_gguf: WriteGguf) -> None:
    template = "{% for m in messages %}<|begin|>{{ m.content }}<|end|>{% endfor %}"
    metadata = {**byte_level, "tokenizer.ggml.pre": "gpt-2", "tokenizer.chat_template": template}
    tokenizer = tokenizer_of(write_gguf(metadata=metadata))
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "it's"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|begin|>Hello<|end|><|begin|>it's<|end|>"


# -- sentencepiece BPE --------------------------------------------------------------------------------------------

# Best score first; "nd" before "in" and "re" before "er" decide how "ind" and "ere" merge.
PIECES = (
    "\u2581t", "he", "\u2581the", "nd", "in", "\u2581in", "\u2581a", "re", "er", "on", "st", "en", "ing", "\u2581w",
    "or", "\u2581wor", "ld", "\u2581world", "12", "123", "\u2581\u2581", "\u2581\u2581\u2581\u2581", "a\u2581b", "你好",
)  # fmt: skip


@pytest.fixture
def sentencepiece(write_gguf: WriteGguf) -> tuple[PreTrainedTokenizerBase, Mapping[str, float]]:
    """A small tokenizer like Llama 2's, and the score of each of its ordinary tokens."""
    return _sentencepiece(write_gguf)


def _sentencepiece(
    write_gguf: WriteGguf, *, all_bytes: bool = True, **flags: bool
) -> tuple[PreTrainedTokenizerBase, Mapping[str, float]]:
    characters = dict.fromkeys(c for c in "".join(PIECES) + "abcdefghijklmnopqrstuvwxyz0123456789.,'")
    best_first = [*PIECES, *(c for c in characters if c not in PIECES)]
    scores = {token: -float(rank) for rank, token in sorted(enumerate(best_first), key=lambda pair: pair[1])}
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)] if all_bytes else []
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *scores]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * len(byte_tokens) + [NORMAL] * len(scores)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * (3 + len(byte_tokens)) + list(scores.values()),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in flags.items()},
    }
    return tokenizer_of(write_gguf(metadata=metadata)), scores


def merged(text: str, scores: Mapping[str, float]) -> list[str]:
    """What sentencepiece does: unite the neighbours whose union is the token of the best score, until none is one."""
    symbols = list(text)
    while True:
        unions = [(scores.get(left + right), -i) for i, (left, right) in enumerate(itertools.pairwise(symbols))]
        possible = [(score, at) for score, at in unions if score is not None]
        if not possible:
            break
        at = -max(possible)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [
        piece
        for symbol in symbols
        for piece in ([symbol] if symbol in scores else [f"<0x{byte:02X}>" for byte in symbol.encode()])
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(text=st.lists(st.sampled_from([*"the lowrdingas12 .é你好🙂\n", "ind", "ere", " the", " world"])).map("".join))
def test_sentencepiece_merges_the_best_score_first(
    text: str, sentencepiece: tuple[PreTrainedTokenizerBase, Mapping[str, float]]
) -> None:
    tokenizer, scores = sentencepiece
    spelled = ("\u2581" + text).replace(" ", "\u2581") if text else ""
    assert tokenizer.tokenize(text) == merged(spelled, scores)
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_vocabulary_without_a_prefix_space(write_gguf: WriteGguf) -> None:
    tokenizer, _ = _sentencepiece(write_gguf, add_space_prefix=False, add_bos_token=False)
    assert tokenizer.tokenize("in the world") == ["in", "\u2581the", "\u2581world"]
    assert tokenizer.decode(tokenizer.encode(" in")) == " in"


def test_what_a_vocabulary_without_bytes_cannot_spell_is_one_unknown_token(write_gguf: WriteGguf) -> None:
    tokenizer, _ = _sentencepiece(write_gguf, all_bytes=False)
    assert tokenizer.tokenize("in é🙂 the") == ["\u2581in", "\u2581", "<unk>", "\u2581the"]


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "the tokenizer model 't5'; supported: gpt2, llama"),
        ({"tokenizer.ggml.model": None}, "the tokenizer model None; supported: gpt2, llama"),
        ({"tokenizer.ggml.pre": "new-kind"}, "the pre-tokeniser 'new-kind'; supported: default, gpt-2"),
        ({"tokenizer.ggml.tokens": None}, r"'tokenizer\.ggml\.tokens' has no tokens"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, r"'tokenizer\.ggml\.tokens' has the same token twice"),
        ({"tokenizer.ggml.token_type": [1]}, r"'tokenizer\.ggml\.token_type' has 1 entries for"),
        ({"tokenizer.ggml.merges": None}, r"has no 'tokenizer\.ggml\.merges'"),
        ({"tokenizer.ggml.bos_token_id": 100000}, r"'tokenizer\.ggml\.bos_token_id' is 100000, of \d+ tokens"),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, r"'tokenizer\.ggml\.eos_token_id' is '</s>'; it must be an integer"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_says_why(
    metadata: dict[str, Any], message: str, byte_level: Mapping[str, Any], write_gguf: WriteGguf
) -> None:
    path = write_gguf(metadata={**byte_level, "tokenizer.ggml.pre": "gpt-2", **metadata})
    with pytest.raises(ValueError, match=rf"model\.gguf.*{message}"):
        tokenizer_of(path)
