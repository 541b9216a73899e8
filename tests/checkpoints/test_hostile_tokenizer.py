"""Tokenizer files that ask for too much, or that the libraries cannot bear; several were found by `make fuzz`."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from checkpoints import hf_tokenizer
from checkpoints.gguf_file import GgufFile
from checkpoints.gguf_tokenizer import load_tokenizer
from trtllm_jax.text.tokenizer import MAX_ID, Tokenizer

WriteGguf = Callable[..., Path]
WORDS = {"type": "WordLevel", "vocab": {"a": 1, "<unk>": 0}, "unk_token": "<unk>"}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTE_PAIRS = {"type": "BPE", "vocab": {"a": 0, "b": 1, "é": 2}, "merges": []}


def tokenizer_of(folder: Path, **parts: Any) -> Tokenizer:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    content = {"version": "1.0", "added_tokens": [], "model": WORDS, **empty, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer(hf_tokenizer.load_tokenizer(folder, use_fast=True))


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": BYTE_PAIRS | {"merges": [["a", "é"]], "continuing_subword_prefix": "xxx"}},
        {"model": BYTE_PAIRS | {"merges": [["a", "nowhere"]]}},
        {"model": {"type": "Unigram", "vocab": [], "unk_id": 2**40}},
        {"pre_tokenizer": SPLIT | {"pattern": {"Regex": "("}}},
        {"model": None},
        {"added_tokens": [{"id": -1, "content": "x"}]},
    ],
)
def test_what_cannot_be_loaded_names_the_folder(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path} has no tokenizer that transformers can load: .*give the folder"):
        tokenizer_of(tmp_path, **parts)


def test_what_breaks_while_it_is_copied_is_refused() -> None:
    backend = RustTokenizer(WordLevel({"a": 0}, unk_token="a"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend)
    # A merge may not be shorter than the prefix, which the library finds when it reads its own copy.
    wrapped._tokenizer = RustTokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    wrapped._tokenizer.model.continuing_subword_prefix = "x" * 9
    with pytest.raises(ValueError, match=r"the tokenizer cannot be copied: .*Check its files"):
        Tokenizer(wrapped)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"model": WORDS | {"unk_token": "missing"}}, "b"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "a"),
        ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(x+x+)+y"}}}, "x" * 40),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "Q", "type_id": 0}}],
                                "pair": [], "special_tokens": {}}},
            "a",
        ),
    ],
)  # fmt: skip
def test_what_cannot_encode_refuses_the_prompt(parts: dict[str, Any], text: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, **parts)
    with pytest.raises(ValueError, match=r"the tokenizer cannot encode the prompt: .*Check its files"):
        tokenizer.encode(text)


def test_an_id_far_beyond_any_vocabulary_is_refused(tmp_path: Path) -> None:
    """The library lists all ids that are left out when it copies itself: 16 GiB, and the process is aborted."""
    with pytest.raises(ValueError, match=rf"the tokenizer has the id {2**32 - 1}; ids up to {MAX_ID} are read"):
        tokenizer_of(tmp_path, model=WORDS | {"vocab": {"a": 2**32 - 1, "<unk>": 0}})


def test_other_fields_of_the_configuration_are_not_obeyed(tmp_path: Path) -> None:
    """transformers makes a dict entry for each of `num_labels`: seconds and gigabytes for a billion."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_labels": 1000000000}')
    assert tokenizer_of(tmp_path).encode("a") == [1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


@pytest.mark.parametrize("field", ["tokenizer_file", "vocab_file", "fast_tokenizer_files"])
def test_a_tokenizer_configuration_leads_to_no_other_file(field: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    tokenizer_of(tmp_path / "other", model=WORDS | {"vocab": {"a": 77, "<unk>": 0}})
    folder = tmp_path / "model"
    folder.mkdir()
    path = str(tmp_path / "other" / "tokenizer.json")
    stated: Any = path
    if field == "fast_tokenizer_files":
        (tmp_path / "other" / "tokenizer.json").rename(tmp_path / "other" / "tokenizer.1.json")
        stated = ["../other/tokenizer.1.json"]
    (folder / "tokenizer_config.json").write_text(json.dumps({field: stated}))
    try:
        assert tokenizer_of(folder).encode("a") == [1]
    except ValueError as error:
        assert "fast_tokenizer_files" in str(error)  # noqa: PT017 - not read, or refused
        assert field == "fast_tokenizer_files"


# -- in GGUF ------------------------------------------------------------------------------------------------------

BYTE_LEVEL = {"model": "gpt2", "tokens": ["a", "b", "ab"], "token_type": [1, 1, 1], "merges": ["a b"]}
PIECES = {
    "model": "llama",
    "tokens": ["<u>", "a", "b", "ab"],
    "token_type": [2, 1, 1, 1],
    "scores": [0.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (BYTE_LEVEL | {"merges": ["a \0"]}, "has a tokenizer that cannot be built: .*Token ` ` out of vocabulary"),
        (BYTE_LEVEL | {"merges": ["ab"]}, "has a tokenizer that cannot be built"),
        (BYTE_LEVEL | {"merges": [1, 2]}, r"'tokenizer\.ggml\.merges' is \[1, 2\]; it must be an array of str"),
        (BYTE_LEVEL | {"merges": "a b"}, r"'tokenizer\.ggml\.merges' is 'a b'; it must be an array of str"),
        (BYTE_LEVEL | {"tokens": 7}, r"'tokenizer\.ggml\.tokens' is 7; it must be an array of str"),
        (BYTE_LEVEL | {"tokens": [1, 2, 3]}, r"'tokenizer\.ggml\.tokens' is \[1, 2, 3\]; it must be an array of str"),
        (BYTE_LEVEL | {"token_type": ["a", "b", "c"]}, "it must be an array of int"),
        (BYTE_LEVEL | {"pre": [1]}, r"'tokenizer\.ggml\.pre' is \[1\]; it must be a str"),
        (BYTE_LEVEL | {"add_bos_token": "yes"}, "'yes'; it must be a bool"),
        (BYTE_LEVEL | {"bos_token_id": [0]}, r"\[0\]; it must be an integer"),
        (PIECES | {"scores": [1, 2, 3, 4]}, "it must be an array of float"),
        (PIECES | {"tokens": ["<u>", "a", "b", "a" * 1000]}, "of 1000 characters; at most 128 are read"),
        (PIECES | {"model": ["llama"]}, r"the tokenizer model \['llama'\]; supported"),
    ],
)
def test_gguf_metadata_of_another_kind_is_named(metadata: dict[str, Any], message: str, write_gguf: WriteGguf) -> None:
    path = write_gguf(metadata={f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    with pytest.raises(ValueError, match=rf"model\.gguf.*{message}") as caught:
        load_tokenizer(GgufFile(path))
    assert str(caught.value).isprintable()


def test_a_vocabulary_that_implies_endless_merges_is_refused(write_gguf: WriteGguf) -> None:
    """Every cut of every a...ab...b gives two tokens: merges grow with the square of the vocabulary."""
    tokens = ["<u>", *("a" * i + "b" * j for i in range(60) for j in range(60) if i + j)]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2] + [1] * (len(tokens) - 1),
        "scores": [0.0] * len(tokens),
    }
    path = write_gguf(metadata={f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    with pytest.raises(ValueError, match=rf"'tokenizer\.ggml\.tokens' implies more than {16 * len(tokens)} merges"):
        load_tokenizer(GgufFile(path))
