"""safetensors and JSON files that lie; what the safetensors package refuses, we refuse."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from checkpoints.json_file import read_object
from checkpoints.safetensors_file import MAX_HEADER_BYTES
from checkpoints.safetensors_source import SafetensorsSource

NAME = "model.safetensors"


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def file_of(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


REFUSED = {
    "overlap": (file_of({"a": entry(0, 8), "b": entry(4, 8)}), "'b' begins at byte 4 of its data, not at byte 8"),
    "gap": (file_of({"a": entry(0, 2), "b": entry(4, 8)}), "'b' begins at byte 4 of its data, not at byte 2"),
    "hidden end": (file_of({"a": entry(0, 4)}), "its tensors end at byte 4 of its data, which has 8"),
    "hidden begin": (file_of({"a": entry(4, 8)}), "'a' begins at byte 4"),
    "past the end": (file_of({"a": entry(0, 2**40)}), f"'a' should end at byte {2**40} of its data, which has 8"),
    "overflow": (file_of({"a": entry(0, 8, [2**62, 2**62])}), "malformed"),
    "overflow around": (file_of({"a": entry(0, 8, [2**63, 2, 4])}), "malformed"),
    "empty and huge": (file_of({"a": entry(0, 0, [0, 2**62]), "b": entry(0, 8)}), "malformed"),
    "endless digits": (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "many dimensions": (file_of({"a": entry(0, 8, [1] * 100 + [8])}), "malformed"),
    "shape of bools": (file_of({"a": entry(0, 1, [True]), "b": entry(1, 8)}), "malformed"),
    "shape of nothing": (file_of({"a": entry(0, 1, [None]), "b": entry(1, 8)}), "malformed"),
    "shape is a dict": (file_of({"a": {"dtype": "U8", "shape": {}, "data_offsets": [0, 1]}}), "malformed"),
    "dtype is a list": (file_of({"a": entry(0, 8, dtype=["U8"])}), "malformed"),
    "dtype is unknown": (file_of({"a": entry(0, 8, dtype="x" * 9000)}), r"is stored as 'xx+\.\.\.x+'; supported"),
    "does not divide": (file_of({"a": entry(0, 7, [2], "F32"), "b": entry(7, 8)}), "do not fit F32"),
    "unknown field": (file_of({"a": entry(0, 8) | {"strides": [1]}}), "malformed"),
    "deep field": (file_of(b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}"), "malformed"),
    "deeper": (file_of(b'{"a": ' + b"[" * 90000 + b"]" * 90000 + b"}"), "nested too deeply"),
    "twice": (file_of(b'{"a": 1, "b": 2, "a": 3}'), "the key 'a' is there twice"),
    "twice inside": (file_of(b'{"a": {"dtype": "U8", "dtype": "U8"}}'), "the key 'dtype' is there twice"),
    "half a pair": (file_of(b'{"a\\ud800": ' + json.dumps(entry(0, 8)).encode() + b"}"), "not valid JSON"),
    "metadata of half a pair": (file_of({"__metadata__": {"a": "\ud800"}, "s": entry(0, 8)}), "not valid JSON"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}, "s": entry(0, 8)}), "'__metadata__' that is not"),
    "UTF-16": (file_of(json.dumps({"a": entry(0, 8)}).encode("utf-16")), "not valid JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "space before": (file_of(b" " + json.dumps({"a": entry(0, 8)}).encode()), "not a JSON object"),
    "NaN": (file_of(b'{"a": NaN}'), "malformed"),
    "header of all bytes": (struct.pack("<Q", 2**64 - 1) + bytes(64), "states a header of"),
    "header past the end": (struct.pack("<Q", 1000) + b"{}", "truncated"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_lying_header_is_refused(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}") as caught:
        SafetensorsSource(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000
    stricter = {"twice", "twice inside", "unknown field", "empty and huge", "many dimensions", "space before"}
    if case not in stricter:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(content)


def test_a_huge_header_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / NAME).open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(2**40)  # a sparse file
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"model\.safetensors .*states a header of 100000001 bytes"):
        SafetensorsSource(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_names_may_be_any_text(tmp_path: Path) -> None:
    names = ["", "../../etc/passwd", "a\nb", "\0", "é🙂", "x" * 10_000]
    (tmp_path / NAME).write_bytes(file_of({name: entry(i, i + 1) for i, name in enumerate(names)}, bytes(6)))
    source = SafetensorsSource(tmp_path)
    assert list(source.info) == names
    np.testing.assert_array_equal(source.read("\0", (slice(None),)), [0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice; remove one"),
        (b'{"a": {"b": [{"c": 1, "c": 1}]}}', "the key 'c' is there twice"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "\xc3"}', "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\0" * 100, "not valid JSON"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"123", "holds a JSON int; it must be an object"),
    ],
)
def test_json_that_readers_may_see_differently_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
        read_object(tmp_path / "config.json")


def test_json_with_a_byte_order_mark_and_pairs_of_surrogates_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude42", "b": Infinity}')
    assert read_object(tmp_path / "config.json") == {"a": "🙂", "b": float("inf")}
