"""llama2.c files, against its `run.c` written in numpy."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.checkpoint import open_checkpoint
from tests.story import Story

HEADER = (16, 24, 2, 4, 2, 261, 12)  # dim, hidden_dim, layers, heads, kv_heads, vocabulary, seq_len
PIECES = {
    "<unk>": 0.0, "\n<s>\n": 0.0, "\n</s>\n": 0.0, **{f"<0x{i:02X}>": 0.0 for i in range(256)},
    " a": -0.0, "b": -1.0,
}  # fmt: skip
MORE = {" ": -5.0, "a": -6.0, "c": -7.0, "ab": -2.0, " ab": -3.0, "bc": -1.5, "é": -8.0, "abc": -4.0}


def weights(header: tuple[int, ...] = HEADER, seed: int = 0) -> dict[str, np.ndarray]:
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = header
    kv = dim // heads * kv_heads
    shapes = {
        "embed": (abs(vocab), dim), "att_norm": (layers, dim), "q": (layers, dim, dim), "k": (layers, kv, dim),
        "v": (layers, kv, dim), "o": (layers, dim, dim), "ffn_norm": (layers, dim), "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden), "w3": (layers, hidden, dim), "norm": (dim,), "rotations": (seq_len, dim // heads),
    }  # fmt: skip
    if vocab < 0:
        shapes["classifier"] = (-vocab, dim)
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_model(path: Path, header: tuple[int, ...] = HEADER) -> dict[str, np.ndarray]:
    made = weights(header)
    path.write_bytes(struct.pack("<7i", *header) + b"".join(array.tobytes() for array in made.values()))
    return made


def write_tokenizer(path: Path, pieces: dict[str, float]) -> None:
    entries = [struct.pack("<fi", score, len(piece.encode())) + piece.encode() for piece, score in pieces.items()]
    path.write_bytes(struct.pack("<i", max(map(len, pieces))) + b"".join(entries))


def run_c(w: dict[str, np.ndarray], header: tuple[int, ...], tokens: list[int]) -> np.ndarray:
    """Logits [tokens, vocabulary], as `forward` of run.c: pairs of neighbours are rotated."""
    dim, _, layers, heads, kv_heads, *_ = header
    size = dim // heads

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def rotate(x: np.ndarray) -> np.ndarray:
        angle = np.arange(len(x))[:, None, None] / 10000 ** (np.arange(0, size, 2) / size)
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = (even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle))
        return np.stack(turned, -1).reshape(x.shape)

    x = w["embed"][tokens].astype(np.float64)
    future = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    for i in range(layers):
        h = norm(x, w["att_norm"][i])
        q = rotate((h @ w["q"][i].T).reshape(len(x), heads, size))
        k = rotate((h @ w["k"][i].T).reshape(len(x), kv_heads, size)).repeat(heads // kv_heads, 1)
        v = (h @ w["v"][i].T).reshape(len(x), kv_heads, size).repeat(heads // kv_heads, 1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(size) + future
        p = np.exp(scores - scores.max(-1, keepdims=True))
        x = x + np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v).reshape(len(x), dim) @ w["o"][i].T
        h = norm(x, w["ffn_norm"][i])
        gate = h @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][i].T)) @ w["w2"][i].T
    return norm(x, w["norm"]) @ w.get("classifier", w["embed"]).T


def encode_c(pieces: dict[str, float], text: str) -> list[int]:
    """`encode` of run.c: characters, or their bytes, then always the best pair is merged."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    names = list(pieces)
    tokens = [1, *([ids[" "]] if text else [])]
    for character in text:
        tokens += [ids[character]] if character in ids else [byte + 3 for byte in character.encode()]
    while True:
        pairs = [(pieces.get(names[a] + names[b], -1e10), -i) for i, (a, b) in enumerate(itertools.pairwise(tokens))]
        best = max(pairs, default=(-1e10, 0))
        if best[0] == -1e10:
            return tokens
        at = -best[1]
        tokens[at : at + 2] = [ids[names[tokens[at]] + names[tokens[at + 1]]]]


def logits_of(folder_tensors: Any, config: dict[str, Any], tokens: list[int]) -> np.ndarray:
    """By transformers, of the tensors that we read."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    state = {
        n: torch.from_numpy(folder_tensors.read(n, (slice(None),) * len(i.shape)).copy())
        for n, i in folder_tensors.info.items()
    }
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("vocab", [261, -261], ids=["tied", "untied"])
def test_transformers_computes_what_run_c_computes(vocab: int, tmp_path: Path) -> None:
    header = (*HEADER[:5], vocab, HEADER[6])
    made = write_model(tmp_path / "model.bin", header)
    checkpoint = open_checkpoint(tmp_path / "model.bin")
    assert checkpoint.config["tie_word_embeddings"] == (vocab > 0)
    tokens = [1, 5, 260, 17, 5, 99]
    expected = run_c(made, header, tokens)
    found = logits_of(checkpoint.tensors, checkpoint.config, tokens)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_any_part_is_the_part_of_the_whole(tmp_path: Path) -> None:
    write_model(tmp_path / "model.bin")
    tensors = open_checkpoint(tmp_path / "model.bin").tensors
    for name, info in tensors.info.items():
        whole = tensors.read(name, (slice(None),) * len(info.shape))
        index = tuple(slice(length // 3, length // 3 + 5) for length in info.shape)
        np.testing.assert_array_equal(tensors.read(name, index), whole[index])


def test_the_tokenizer_encodes_as_run_c_does(tmp_path: Path) -> None:
    pieces = PIECES | MORE
    write_model(tmp_path / "model.bin", (*HEADER[:5], len(pieces), HEADER[6]))
    write_tokenizer(tmp_path / "tokenizer.bin", pieces)
    tokenizer = open_checkpoint(tmp_path / "model.bin").load_tokenizer()
    for text in ("abc ab cab", "a", "", "é日 a", "bcabcb  a", "a\nb"):
        ids = tokenizer.encode(text)
        assert ids[1:] == encode_c(pieces, text)[1:], text
        assert ids[0] == tokenizer.bos_token_id == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == 2


def test_the_tokenizer_is_found_by_its_usual_names_or_given(tmp_path: Path) -> None:
    write_model(tmp_path / "model.bin")
    checkpoint = open_checkpoint(tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"has no tokenizer\.bin or tok261\.bin beside it"):
        checkpoint.load_tokenizer()
    write_tokenizer(tmp_path / "other.bin", PIECES)
    assert len(checkpoint.load_tokenizer(tmp_path / "other.bin")) == 261
    write_tokenizer(tmp_path / "wrong.bin", PIECES | MORE)
    with pytest.raises(ValueError, match=r"wrong\.bin has 269 tokens and the model 261"):
        checkpoint.load_tokenizer(tmp_path / "wrong.bin")
    write_tokenizer(tmp_path / "tok261.bin", PIECES)
    assert len(checkpoint.load_tokenizer()) == 261


@pytest.mark.parametrize(
    "header",
    [
        (2**31 - 1,) * 7, (16, 24, 2**31 - 1, 4, 2, 261, 12), (16, 24, 2, 4, 2, 2**31 - 1, 12), (0,) * 7, (-16,) * 7,
        (16, 24, 2, 3, 2, 261, 12), (16, 24, 2, 4, 3, 261, 12), (16, 24, 2, 16, 2, 261, 12), (16, 24, 2, 4, 2, 261, 11),
        (0x616B3432, 1, 16, 24, 2, 4, 2),
    ],
)  # fmt: skip
def test_a_header_that_does_not_fit_the_file_is_refused(header: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_model(path)
    path.write_bytes(struct.pack("<7i", *header) + path.read_bytes()[28:])
    with pytest.raises(ValueError, match=r"model\.bin is (damaged or )?no llama2\.c model"):
        open_checkpoint(path)


@pytest.mark.parametrize("size", [1, 27, 28, 1000, -1, -4])
def test_a_file_cut_off_anywhere_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_model(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.bin is (damaged or )?no llama2\.c model"):
        open_checkpoint(path)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tok.bin"
    write_model(tmp_path / "model.bin")
    checkpoint = open_checkpoint(tmp_path / "model.bin")
    write_tokenizer(path, PIECES)
    content = path.read_bytes()
    for damaged in (
        content[:-1],
        content[:10],
        b"",
        content[:8] + b"\xff\xff\xff\xff" + content[12:],
        content[:8] + b"\xff\xff\xff\x7f" + content[12:],
        content[:-1] + b"\xff",
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tok\.bin is damaged or no llama2\.c tokenizer"):
            checkpoint.load_tokenizer(path)


def test_a_trained_model_tells_its_story(story: Story) -> None:
    checkpoint = open_checkpoint(story.model)
    tokenizer = checkpoint.load_tokenizer()
    data = np.fromfile(story.model, "<f4", offset=28)
    header = struct.unpack("<7i", story.model.read_bytes()[:28])
    made, offset = {}, 0
    for name, array in weights(header).items():
        made[name] = data[offset : offset + array.size].reshape(array.shape)
        offset += array.size
    assert tokenizer.encode(story.text) == story.ids
    expected = run_c(made, header, story.ids)
    assert expected[:-1].argmax(-1).tolist() == story.ids[1:]
    found = logits_of(checkpoint.tensors, checkpoint.config, story.ids)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    assert tokenizer.decode([1, *found[:-1].argmax(-1)], skip_special_tokens=True) == story.text
