"""Small valid files of every kind that a checkpoint may hold, from which fuzzing starts."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
ROPES: Sequence[Mapping[str, Any]] = (
    {"rope_type": "linear", "factor": 2.0},
    {"type": "dynamic", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 20, "mscale": 0.7},
    {"rope_type": "frequency_factors", "factors": [1.0, 2.0, 4.0, 8.0]},
)
TOKENIZER: Mapping[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": 3, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
    ],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "_"}]},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": False},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "ByteFallback"},
    "model": {"type": "BPE", "unk_token": "<u>", "vocab": {"<u>": 0, "a": 1, "b": 2, "<s>": 3, "ab": 4},
              "merges": [["a", "b"]]},
}  # fmt: skip
TOKENIZER_CONFIG: Mapping[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
    "unk_token": "<u>",
    "model_max_length": 64,
    "added_tokens_decoder": {"3": {"content": "<s>", "special": True}},
    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "clean_up_tokenization_spaces": False,
    "fast_tokenizer_files": ["tokenizer.json"],
}


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


def safetensors() -> list[bytes]:
    tensors = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "F8_E4M3", "shape": [0, 4], "data_offsets": [32, 32]},
    }
    scalar = {"s": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}}
    return [
        safetensors_file(tensors, bytes(range(32))),
        safetensors_file({"__metadata__": {"format": "pt"}, **scalar}, bytes(8)),
        safetensors_file({}, b""),
    ]


def safetensors_file(header: Any, data: bytes) -> bytes:
    stated = text(header)
    return struct.pack("<Q", len(stated)) + stated + data


def indexes() -> list[bytes]:
    return [text({"metadata": {"total_size": 32}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}})]


def configs() -> list[bytes]:
    return [text(CONFIG), *(text({**CONFIG, "rope_scaling": rope}) for rope in ROPES)]


def tokenizers() -> list[bytes]:
    word_level = {"type": "WordLevel", "vocab": {"a": 0, "<u>": 1}, "unk_token": "<u>"}
    unigram = {"type": "Unigram", "vocab": [["<u>", 0.0], ["a", -1.0]], "unk_id": 0}
    models = (TOKENIZER["model"], word_level, unigram)
    return [text({**TOKENIZER, "model": model}) for model in models]


def tokenizer_configs() -> list[bytes]:
    return [text(TOKENIZER_CONFIG)]


def ggufs() -> list[bytes]:
    """One file a type of tensor, and one of each kind of tokenizer and rope scaling."""
    names = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
    types = [GGMLQuantizationType[name] for name in names]
    linear = [("llama.rope.scaling.type", STRING, "linear"), ("llama.rope.scaling.factor", F32, 2.0)]
    yarn = [
        ("llama.rope.scaling.type", STRING, "yarn"),
        ("llama.rope.scaling.factor", F32, 2.0),
        ("llama.rope.scaling.original_context_length", U32, 32),
        ("llama.rope.scaling.attn_factor", F32, 0.5),
    ]
    return [
        *(gguf_file(BYTE_LEVEL, quantised=kind) for kind in types),
        gguf_file(SENTENCEPIECE),
        gguf_file([*BYTE_LEVEL, *linear]),
        gguf_file([*BYTE_LEVEL, *yarn]),
    ]


def llama2c() -> list[bytes]:
    """Dimension 8, feed-forward 4, 1 layer, 2 heads and 1 key head, vocabulary 3, 2 positions; tied, then untied."""
    counts = (3 * 8, 8, 8 * 8, 4 * 8, 4 * 8, 8 * 8, 8, 3 * 4 * 8, 8, 2 * 4)
    tied = struct.pack("<7i", 8, 4, 1, 2, 1, 3, 2) + b"\x00\x00\x80\x3f" * sum(counts)
    return [tied, struct.pack("<7i", 8, 4, 1, 2, 1, -3, 2) + tied[28:] + bytes(4 * 3 * 8)]


def llama2c_tokenizers() -> list[bytes]:
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", "<0x41>", " ", "a", "b", "ab", " ab"]
    entries = [struct.pack("<fi", -float(i), len(piece)) + piece.encode() for i, piece in enumerate(pieces)]
    return [struct.pack("<i", 6) + b"".join(entries)]


Value = tuple[str, int, Any]  # key, type, value

LLAMA: Sequence[Value] = [
    ("general.architecture", STRING, "llama"),
    ("general.alignment", U32, 32),
    ("llama.block_count", U32, 1),
    ("llama.context_length", U32, 64),
    ("llama.embedding_length", U32, 32),
    ("llama.feed_forward_length", U32, 64),
    ("llama.attention.head_count", U32, 4),
    ("llama.attention.head_count_kv", U32, 2),
    ("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
    ("llama.rope.freq_base", F32, 10000.0),
]
BYTE_LEVEL: Sequence[Value] = [
    ("tokenizer.ggml.model", STRING, "gpt2"),
    ("tokenizer.ggml.pre", STRING, "llama-bpe"),
    ("tokenizer.ggml.tokens", ARRAY, (STRING, ["<s>", "a", "b", "ab"])),
    ("tokenizer.ggml.token_type", ARRAY, (5, [3, 1, 1, 1])),
    ("tokenizer.ggml.merges", ARRAY, (STRING, ["a b"])),
    ("tokenizer.ggml.bos_token_id", U32, 0),
    ("tokenizer.ggml.add_bos_token", BOOL, True),
    ("tokenizer.chat_template", STRING, "{{ messages }}"),
]
SENTENCEPIECE: Sequence[Value] = [
    ("tokenizer.ggml.model", STRING, "llama"),
    ("tokenizer.ggml.tokens", ARRAY, (STRING, ["<unk>", "<s>", "a", "b", "ab", "<0x41>"])),
    ("tokenizer.ggml.token_type", ARRAY, (5, [2, 3, 1, 1, 1, 6])),
    ("tokenizer.ggml.scores", ARRAY, (F32, [0.0, 0.0, -1.0, -2.0, -3.0, 0.0])),
    ("tokenizer.ggml.bos_token_id", U32, 1),
    ("tokenizer.ggml.unknown_token_id", U32, 0),
    ("tokenizer.ggml.add_space_prefix", BOOL, False),
]


def gguf_file(
    tokenizer: Sequence[Value], *, quantised: GGMLQuantizationType = GGMLQuantizationType.F32, version: int = 3
) -> bytes:
    """A model of one layer with some of its tensors; the K types need rows of 256."""
    columns = GGML_QUANT_SIZES[quantised][0]
    tensors = [
        ("token_embd.weight", [max(columns, 32), 4], quantised),
        ("blk.0.attn_q.weight", [max(columns, 32), 8], quantised),
        ("output_norm.weight", [32], GGMLQuantizationType.F32),
        ("rope_freqs.weight", [4], GGMLQuantizationType.F32),
    ]
    scaled = any(key.startswith("llama.rope.scaling") for key, _, _ in tokenizer)
    tensors = tensors[: -1 if scaled else None]
    values = [*LLAMA, *tokenizer]
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    header += b"".join(_string(key) + struct.pack("<I", kind) + _value(kind, value) for key, kind, value in values)
    data = b""
    for name, sizes, tensor_type in tensors:
        header += _string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor_type, len(data))
        block, block_bytes = GGML_QUANT_SIZES[tensor_type]
        stored = b"\x00\x3c" * (sizes[0] * (sizes[1] if len(sizes) > 1 else 1) // block * block_bytes // 2)
        data += stored + bytes(-len(stored) % 32)
    return header + bytes(-len(header) % 32) + data


def _string(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:
        item, values = value
        return struct.pack("<IQ", item, len(values)) + b"".join(_value(item, one) for one in values)
    return struct.pack({U32: "<I", 5: "<i", F32: "<f", BOOL: "?"}[kind], value)
