"""GGUF files that lie: each names the file and what is wrong, and takes no memory by its word."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from checkpoints.gguf_config import model_config
from checkpoints.gguf_file import GgufFile
from checkpoints.gguf_header import MAX_HEADER_BYTES, MAX_METADATA, MAX_TENSORS
from checkpoints.gguf_source import GgufSource

from .gguf_llama import LLAMA

WriteGguf = Callable[..., Path]
U8, U16, U32, STRING, ARRAY, U64 = 0, 2, 4, 8, 9, 10


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def value(kind: int, content: bytes, key: bytes = b"k") -> bytes:
    return text(key) + struct.pack("<I", kind) + content


def tensor(sizes: list[int], kind: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file_of(*values: bytes, tensors: tuple[bytes, ...] = (), data: int = 64, counts: tuple[int, int] = (0, 0)) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, counts[0] or len(tensors), counts[1] or len(values))
    content = head + b"".join(values) + b"".join(tensors)
    return content + bytes(-len(content) % 32) + bytes(data)


Q4_0, Q8_0, Q6_K = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q6_K
REFUSED = {
    "count of tensors": (file_of(counts=(2**64 - 1, 0)), f"states {2**64 - 1} tensors; at most {MAX_TENSORS} are read"),
    "count of values": (file_of(counts=(0, 2**63)), f"states {2**63} metadata values; at most {MAX_METADATA} are read"),
    "more tensors than there are": (file_of(counts=(1000, 0)), "truncated|dimensions|shape"),
    "string of all bytes": (file_of(value(STRING, struct.pack("<Q", 2**64 - 1))), "its header goes on past"),
    "string past the end": (file_of(value(STRING, struct.pack("<Q", 1000))), "its header goes on past"),
    "key past the end": (file_of(struct.pack("<Q", 2**40)), "its header goes on past"),
    "array of all numbers": (file_of(value(ARRAY, struct.pack("<IQ", U64, 2**64 - 1))), "its header goes on past"),
    "array that overflows": (file_of(value(ARRAY, struct.pack("<IQ", U64, 2**61))), "its header goes on past"),
    "array of endless strings": (file_of(value(ARRAY, struct.pack("<IQ", STRING, 2**62))), "its header goes on past"),
    "array of arrays": (file_of(value(ARRAY, struct.pack("<IQ", ARRAY, 1))), "'k' is an array of type 9"),
    "unknown type": (file_of(value(99, b"")), "'k' is of the unknown type 99"),
    "key twice": (file_of(value(U8, b"\1"), value(U8, b"\1")), "states 'k' twice"),
    "not UTF-8": (file_of(value(STRING, text(b"\xff\xfe"))), "is not UTF-8"),
    "tensor twice": (file_of(tensors=(tensor([4]), tensor([4], offset=32))), "holds the tensor 't' twice"),
    "overlap": (file_of(tensors=(tensor([16]), tensor([4], offset=32, name=b"u"))), "'t' and 'u' overlap"),
    "same place": (file_of(tensors=(tensor([4]), tensor([4], name=b"u"))), "'t' and 'u' overlap"),
    "unaligned": (file_of(tensors=(tensor([4], offset=4),)), "no multiple of the alignment 32"),
    "past the end": (file_of(tensors=(tensor([2**40]),)), "is truncated: the tensor 't' should end at"),
    "offset past the end": (file_of(tensors=(tensor([4], offset=2**63),)), "is truncated: the tensor 't' should end"),
    "sizes that overflow": (file_of(tensors=(tensor([2**32, 2**32, 4]),)), "is truncated: the tensor 't'"),
    "nothing, but huge": (file_of(tensors=(tensor([0, 2**62]),)), "no size may be 0"),
    "many dimensions": (file_of(tensors=(tensor([1] * 9),)), "a tensor of 9 dimensions"),
    "no dimension": (file_of(tensors=(tensor([]),)), r"has the shape \(\)"),
    "half a block": (file_of(tensors=(tensor([16], Q4_0),)), "Q4_0 needs rows of a multiple of 32"),
    "blocks across rows": (file_of(tensors=(tensor([48, 2], Q8_0),)), "Q8_0 needs rows of a multiple of 32"),
    "a K type's block": (file_of(tensors=(tensor([128, 2], Q6_K),)), "Q6_K needs rows of a multiple of 256"),
    "unknown tensor type": (file_of(tensors=(tensor([4], 9999),)), "'t' is of the unknown type 9999"),
    "alignment 0": (file_of(value(U32, bytes(4), b"general.alignment")), "must be a power of two"),
    "alignment 3": (file_of(value(U32, struct.pack("<I", 3), b"general.alignment")), "must be a power of two"),
    "alignment of 8 EiB": (
        file_of(value(U64, struct.pack("<Q", 2**63), b"general.alignment"), tensors=(tensor([4]),)), "is truncated"
    ),
    "alignment is a text": (file_of(value(STRING, text(b"32"), b"general.alignment")), "must be a power of two"),
    "split": (file_of(value(STRING, text(b"2"), b"split.count")), "'split.count' is '2'; it must be an integer"),
    "long names": (file_of(value(99, b"", b"x" * 9000)), "is of the unknown type"),
    "names of several lines": (file_of(value(99, b"", b"a\nb\0")), "is of the unknown type"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_lying_header_is_refused(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"model\.gguf.*({message})") as caught:
        GgufFile(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_header_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(file_of(value(ARRAY, struct.pack("<IQ", U16, 2**40)), data=0))
        file.truncate(2**42)  # a sparse file
    with pytest.raises(ValueError, match=rf"has a header of more than {MAX_HEADER_BYTES} bytes"):
        GgufFile(path)


def test_the_smallest_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(file_of(value(U8, b"\7"), tensors=(tensor([4]), tensor([8], offset=32, name=b"u"))))
    file = GgufFile(path)
    assert (file.metadata, list(file.tensors)) == ({"k": 7}, ["t", "u"])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"attention.head_count": 0}, r"'llama\.attention\.head_count' is 0; it must be a whole number of at least 1"),
        ({"attention.head_count": 4.5}, "is 4.5; it must be a whole number"),
        ({"embedding_length": 2**32 - 1}, "is 4294967295; it must be a whole number"),
        ({"block_count": True}, "is True; it must be a whole number"),
        ({"block_count": [1] * 1000}, r"is \[1, 1, 1, 1, 1, 1, \.\.\.\]; it must be a whole number"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "is nan; it must be a number above 0"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "is -1.0; it must be a number above 0"),
        ({"rope.freq_base": float("inf")}, "is inf; it must be a number above 0"),
        ({"rope.freq_base": "10000"}, "is '10000'; it must be a number above 0"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 0.0}, r"'llama\.rope\.scaling\.factor' is 0.0"),
        ({"rope.scaling.type": ["yarn"]}, r"has rope scaling \['yarn'\]"),
        ({"expert_count": -1.0}, "is -1.0; it must be a whole number of at least 0"),
    ],
)
def test_metadata_of_another_kind_is_named(metadata: dict[str, Any], message: str, write_gguf: WriteGguf) -> None:
    path = write_gguf(metadata={f"llama.{key}": content for key, content in metadata.items()})
    with pytest.raises(ValueError, match=rf"model\.gguf.*{message}"):
        model_config(GgufFile(path), LLAMA)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.ones(3, np.float32), r"must be F32 of the shape \(4,\)"),
        (np.ones((1, 4), np.float32), r"must be F32 of the shape \(4,\)"),
        (np.array([1, 2, 0, 4], np.float32), "must hold numbers above 0"),
        (np.array([1, 2, np.nan, 4], np.float32), "must hold numbers above 0"),
    ],
)
def test_factors_of_the_rope_are_checked(factors: np.ndarray, message: str, write_gguf: WriteGguf) -> None:
    path = write_gguf({"token_embd.weight": np.zeros((4, 32), np.float32), "rope_freqs.weight": factors})
    with pytest.raises(ValueError, match=rf"model\.gguf: 'rope_freqs\.weight' is .*{message}"):
        model_config(GgufFile(path), LLAMA)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.0.attn_q.weight": (3, 32)}, "has 3 rows, which 4 heads of two halves do not divide"),
        ({"output.weight": (4, 32), "lm_head.weight": (4, 32)}, "'lm_head.weight' are the same tensor"),
    ],
)
def test_tensors_that_cannot_be_named_or_ordered_are_refused(
    tensors: dict[str, tuple[int, ...]], message: str, write_gguf: WriteGguf
) -> None:
    shapes = {"token_embd.weight": (4, 32), **tensors}
    path = write_gguf({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match=rf"model\.gguf.*{message}"):
        GgufSource(GgufFile(path), LLAMA)


def test_scales_that_are_no_numbers_dequantise_without_a_warning(write_gguf: WriteGguf) -> None:
    """Warnings are errors here."""
    blocks = np.full((2, 34), 0xFF, np.uint8)
    blocks[1, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    path = write_gguf({"token_embd.weight": blocks}, types={"token_embd.weight": Q8_0})
    values = GgufSource(GgufFile(path), LLAMA).read("model.embed_tokens.weight", np.s_[:, :])
    assert not np.isfinite(values).any()
