"""The wrapper against transformers' own encoding and decoding, alone and from many threads."""

import functools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from checkpoints.checkpoint import open_checkpoint
from trtllm_jax.text.tokenizer import Piece, Tokenizer

TEXTS = ["Hello world, hello there.", "世界 🦙 naïve", "<s>Hello</s> world", "", " two  spaces\n"]


@functools.cache
def transformers_tokenizer() -> PreTrainedTokenizerFast:
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>", "<pad>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    rust.train_from_iterator(TEXTS, trainer)
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    # What a tokenizer.json may carry over from training; prompts must be neither cut nor padded by it.
    rust.enable_truncation(4)
    rust.enable_padding(length=64)
    return PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(transformers_tokenizer())


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_transformers_does(text: str, add_special_tokens: bool) -> None:
    expected = transformers_tokenizer().encode(text, add_special_tokens=add_special_tokens)
    assert tokenizer().encode(text, add_special_tokens) == expected


@pytest.mark.parametrize(
    "name", ["LlamaTokenizerFast", "LlamaTokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"]
)
def test_the_file_tells_the_ids_whatever_class_is_named(name: str, tmp_path: Path) -> None:
    """DeepSeek's distilled Llamas are byte-level and name Llama's class: transformers 5.20 strips their spaces."""
    rust = RustTokenizer.from_str(transformers_tokenizer().backend_tokenizer.to_str())
    rust.no_truncation()
    rust.no_padding()
    rust.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "eos_token": "</s>"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    ours = Tokenizer(open_checkpoint(tmp_path, weights=False).load_tokenizer())
    for text in ["hello  world 12", "héllo 你好\n", *TEXTS]:
        assert ours.encode(text, add_special_tokens=False) == rust.encode(text, add_special_tokens=False).ids
        assert ours.decode(rust.encode(text).ids, skip_special_tokens=False) == rust.decode(
            rust.encode(text).ids, skip_special_tokens=False
        )


@given(st.lists(st.integers(0, 310)), st.booleans())
def test_decodes_as_transformers_does(ids: list[int], skip_special_tokens: bool) -> None:
    expected = transformers_tokenizer().decode(ids, skip_special_tokens=skip_special_tokens)
    assert tokenizer().decode(ids, skip_special_tokens) == expected


@given(st.text())
def test_byte_level_text_survives_the_round_trip(text: str) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False)
    assert tokenizer().decode(ids, skip_special_tokens=False) == text


def test_truncation_keeps_the_last_tokens() -> None:
    ids = tokenizer().encode(TEXTS[0])
    assert len(ids) > 5
    assert tokenizer().encode(TEXTS[0], truncate_to=5) == ids[-5:]
    assert tokenizer().encode(TEXTS[0], truncate_to=1000) == ids


def test_half_a_surrogate_pair_is_refused_with_its_position() -> None:
    with pytest.raises(ValueError, match=r"prompt holds '\\ud83e' at position 2.*remove it"):
        tokenizer().encode("ab\ud83e")


def test_describes_single_tokens() -> None:
    ours = tokenizer()
    assert ours.piece(1) == Piece("</s>", special=True, fixed=True)
    assert ours.piece(ours.vocab_size + 1) == Piece("", known=False)
    assert ours.piece(ours.encode("H", add_special_tokens=False)[0]) == Piece("H", fixed=True)


def test_names_end_and_size() -> None:
    assert tokenizer().eos_ids == (1,)
    assert tokenizer().vocab_size == len(transformers_tokenizer())
    assert Tokenizer(PreTrainedTokenizerFast(tokenizer_object=RustTokenizer(models.BPE()))).eos_ids == ()


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer = object has no fast .* implementation: pass a fast"):
        Tokenizer(object())


def test_threads_do_not_see_the_padding_others_ask_transformers_for() -> None:
    hf = transformers_tokenizer()
    ours = Tokenizer(hf)
    expected = [ours.encode(text) for text in TEXTS]
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            hf("Hello world", padding="max_length", truncation=True, max_length=5)
            hf("Hello world")

    def encode_all(_: int) -> list[list[int]]:
        return [ours.encode(text) for text in TEXTS]

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(result == expected for result in pool.map(encode_all, range(200)))
    finally:
        stop.set()
        disturber.join()
