"""Chat templates with names, and the tokens that end a turn, in GGUF files that the gguf package writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from checkpoints.checkpoint import open_checkpoint
from checkpoints.gguf_chat import chat_templates, turn_ends
from checkpoints.gguf_file import GgufFile
from checkpoints.model_files import write_model_files

from .gguf_llama import LLAMA

WriteGguf = Callable[..., Path]

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
BYTES = sorted(ByteLevel.alphabet())


def tokens(*more: tuple[str, int], **metadata: Any) -> dict[str, Any]:
    """A byte-level tokenizer's metadata: every byte, then those tokens with their types."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*BYTES, "ab", *(token for token, _ in more)],
        "tokenizer.ggml.token_type": [NORMAL] * (len(BYTES) + 1) + [kind for _, kind in more],
        "tokenizer.ggml.merges": ["a b"],
        **{f"tokenizer.{key}": value for key, value in metadata.items()},
    }


def names_of(path: Path) -> set[str]:
    return set(turn_ends(GgufFile(path)))


class TestTemplates:
    TEMPLATES = (
        {"name": "default", "template": "plain {{ messages }}"},
        {"name": "tool_use", "template": "tools {{ tools }}"},
        {"name": "rag", "template": "documents {{ documents }}"},
    )

    @staticmethod
    def written(path: Path, templates: Any) -> GgufFile:
        writer = GGUFWriter(path / "model.gguf", "llama")
        writer.add_chat_template(templates)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return GgufFile(path / "model.gguf")

    @pytest.mark.parametrize("names", [("default", "tool_use"), ("default", "tool_use", "rag"), ("tool_use",)])
    def test_as_the_gguf_package_writes_them(self, names: tuple[str, ...], tmp_path: Path) -> None:
        templates = [each for each in self.TEMPLATES if each["name"] in names]
        expected = {each["name"]: each["template"] for each in templates}
        assert chat_templates(self.written(tmp_path, templates)) == expected

    def test_one_is_a_text(self, tmp_path: Path) -> None:
        assert chat_templates(self.written(tmp_path, "{{ messages }}")) == "{{ messages }}"
        assert chat_templates(self.written(tmp_path, [self.TEMPLATES[0]])) == self.TEMPLATES[0]["template"]

    def test_none_is_none(self, write_gguf: WriteGguf) -> None:
        assert chat_templates(GgufFile(write_gguf())) is None

    @pytest.mark.parametrize("key", ["chat_template", "chat_template.tool_use"])
    def test_what_is_no_text_is_named(self, key: str, write_gguf: WriteGguf) -> None:
        path = write_gguf(metadata=tokens(**{key: 5}))
        with pytest.raises(ValueError, match=rf"'tokenizer.{key}' is 5; it must be a str"):
            open_checkpoint(path).load_tokenizer()

    def test_they_become_the_files_that_transformers_reads(self, write_gguf: WriteGguf, tmp_path: Path) -> None:
        named = {"chat_template": "plain", "chat_template.tool_use": "tools", "chat_template.rag": "documents"}
        checkpoint = open_checkpoint(write_gguf(metadata=tokens(("<s>", CONTROL), **named)), gguf_architectures=[LLAMA])
        folder = tmp_path / "hf"
        folder.mkdir()
        write_model_files(checkpoint, folder, dtype="float32", cast=False, tokenizer=checkpoint.load_tokenizer())
        templates = AutoTokenizer.from_pretrained(folder).chat_template
        assert templates == {"default": "plain", "tool_use": "tools", "rag": "documents"}
        again = tmp_path / "again"
        again.mkdir()
        copied = open_checkpoint(folder)
        write_model_files(copied, again, dtype="float32", cast=False, tokenizer=None)
        assert AutoTokenizer.from_pretrained(again).chat_template == templates
        other = tmp_path / "other"
        other.mkdir()
        bare = copied.load_tokenizer()
        bare.chat_template = None
        write_model_files(copied, other, dtype="float32", cast=False, tokenizer=bare)
        assert AutoTokenizer.from_pretrained(other).chat_template is None

    @pytest.mark.parametrize("name", ["../../escaped", "a/b", "..", "a\\b", "x\0", ""])
    def test_names_lead_nowhere(self, name: str, write_gguf: WriteGguf, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(write_gguf(metadata=tokens(("<s>", CONTROL))), gguf_architectures=[LLAMA])
        tokenizer = checkpoint.load_tokenizer()
        tokenizer.chat_template = {"default": "plain", name: "elsewhere"}
        folder = tmp_path / "out" / "hf"
        folder.mkdir(parents=True)
        with pytest.raises(ValueError, match="which is no file's name: rename it"):
            write_model_files(checkpoint, folder, dtype="float32", cast=False, tokenizer=tokenizer)
        assert not list(tmp_path.rglob("*escaped*"))


class TestTurnEnds:
    @pytest.mark.parametrize(
        "name",
        ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>",
         "<EOT>", "_<EOT>", "▁<EOT>", "[EOT]", "[EOS]", "<｜end▁of▁sentence｜>", "<|return|>", "<|END_OF_TURN_TOKEN|>"],
    )  # fmt: skip
    def test_control_tokens_by_their_names(self, name: str, write_gguf: WriteGguf) -> None:
        path = write_gguf(metadata=tokens(("<|begin|>", CONTROL), (name, CONTROL), ("<|start|>", CONTROL)))
        assert turn_ends(GgufFile(path)) == {name: len(BYTES) + 2}

    @pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED])
    def test_other_tokens_where_a_template_writes_them(self, kind: int, write_gguf: WriteGguf) -> None:
        template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
        added = (("<s>", CONTROL), ("<|im_end|>", kind), ("<|eot_id|>", kind))
        assert names_of(write_gguf(metadata=tokens(*added))) == set()
        for key in ("chat_template", "chat_template.tool_use"):
            path = write_gguf(metadata=tokens(*added, **{key: template}))
            assert names_of(path) == {"<|im_end|>"}
        tokenizer = open_checkpoint(path).load_tokenizer()
        ids = tokenizer.encode("ab<|im_end|>", add_special_tokens=False)
        assert ids == [len(BYTES), len(BYTES) + 2]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"

    def test_what_ends_one_of_several_messages_ends_no_turn(self, write_gguf: WriteGguf) -> None:
        names = ("<|end|>", "<|return|>", "<|call|>", "<|endoftext|>")
        found = names_of(write_gguf(metadata=tokens(*((name, CONTROL) for name in names))))
        assert found == {"<|return|>", "<|call|>", "<|endoftext|>"}
        found = names_of(write_gguf(metadata=tokens(*((name, CONTROL) for name in ("<|end|>", "<|call|>")))))
        assert found == {"<|end|>", "<|call|>"}

    def test_conversion_states_them(self, write_gguf: WriteGguf, tmp_path: Path) -> None:
        first = len(BYTES) + 1
        added = (("<|end_of_text|>", CONTROL), ("<|eot_id|>", CONTROL), ("<|eom_id|>", CONTROL))
        path = write_gguf(metadata=tokens(*added, **{"ggml.eos_token_id": first + 1}))
        checkpoint = open_checkpoint(path, gguf_architectures=[LLAMA])
        assert checkpoint.generation_config == {"eos_token_id": [first + 1]}
        assert checkpoint.turn_ends == {first, first + 1, first + 2}
        folder = tmp_path / "hf"
        folder.mkdir()
        write_model_files(checkpoint, folder, dtype="float32", cast=False, tokenizer=None)
        assert open_checkpoint(folder).generation_config == {"eos_token_id": [first + 1, first, first + 2]}

    @pytest.mark.parametrize("metadata", [{}, {"tokenizer.ggml.tokens": "x"}, {"tokenizer.ggml.tokens": [1, 2]}])
    def test_without_tokens_there_are_none(self, metadata: dict[str, Any], write_gguf: WriteGguf) -> None:
        assert names_of(write_gguf(metadata={"tokenizer.ggml.token_type": [3, 3], **metadata})) == set()
