from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from checkpoints.gguf_file import GgufFile


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A small file with every kind of metadata."""
    path = tmp_path / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -100)
    writer.add_uint16("t.u16", 60000)
    writer.add_int16("t.i16", -30000)
    writer.add_uint32("t.u32", 4_000_000_000)
    writer.add_int32("t.i32", -2_000_000_000)
    writer.add_uint64("t.u64", 2**63)
    writer.add_int64("t.i64", -(2**62))
    writer.add_float32("t.f32", 0.1)
    writer.add_float64("t.f64", 0.1)
    writer.add_bool("t.yes", True)
    writer.add_bool("t.no", False)
    writer.add_string("t.text", "naïve 你好 🙂")
    writer.add_string("t.empty", "")
    writer.add_array("t.words", ["a", "", "é", "▁x"])
    writer.add_array("t.ints", [1, -2, 3])
    writer.add_array("t.floats", [0.5, -1.25])
    writer.add_array("t.flags", [True, False])
    writer.add_custom_alignment(64)
    writer.add_tensor("matrix", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("half", np.arange(5, dtype=np.float16))
    writer.add_tensor("blocks", np.arange(2 * 34, dtype=np.uint8).reshape(2, 34), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_reads_what_the_gguf_package_reads(written: Path) -> None:
    ours, theirs = GgufFile(written), GGUFReader(written)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == expected
    assert {key: type(value) for key, value in ours.metadata.items()} == {k: type(v) for k, v in expected.items()}
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(tensor.shape[::-1].tolist())
        assert (found.type, found.offset) == (tensor.tensor_type, tensor.data_offset)
        assert ours.data(found).tobytes() == tensor.data.tobytes()


def test_blocks_are_the_last_two_dimensions(written: Path) -> None:
    file = GgufFile(written)
    assert file.data(file.tensors["blocks"]).shape == (2, 1, 34)
    assert file.data(file.tensors["matrix"]).shape == (3, 4, 4)


def test_a_file_cut_off_anywhere_is_refused_by_name(written: Path) -> None:
    content = written.read_bytes()
    end = max(tensor.offset + tensor.nbytes for tensor in GgufFile(written).tensors.values())
    for size in range(end):
        written.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"small\.gguf is (truncated|empty)"):
            GgufFile(written)


def test_damage_is_a_value_error_that_names_the_file(written: Path) -> None:
    """Whatever a header's byte becomes: the file is read, or refused with a ValueError that names it."""
    content = written.read_bytes()
    header = min(tensor.offset for tensor in GgufFile(written).tensors.values())
    rng = np.random.default_rng(0)
    refused = 0
    for position in range(header):
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        written.write_bytes(damaged)
        with contextlib.suppress(ValueError), naming(written):
            GgufFile(written)
            continue
        refused += 1
    assert refused > header // 4


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if path.name not in str(error):
            pytest.fail(f"the error does not name the file: {error}")
        raise


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(60), "is not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(60), "GGUF version 1; supported"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(60), "big-endian"),
        (b"", "is empty"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"other\.gguf.*{message}"):
        GgufFile(path)


def test_a_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="one of 2 parts of a model; merge them"):
        GgufFile(path)
