"""What is sent: random prompts, dataset files right and wrong, arrivals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm_jax.commands.bench.workload import (
    BenchRequest,
    arrival_times,
    random_prompts,
    read_dataset,
    synthetic_requests,
)

VOCAB = 50


def encode(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def write(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_random_ids_cover_the_vocabulary_and_nothing_else() -> None:
    prompts = random_prompts(np.random.default_rng(0), 100, 50, VOCAB)
    assert {len(prompt) for prompt in prompts} == {50}
    assert {token for prompt in prompts for token in prompt} == set(range(VOCAB))


def test_synthetic_requests_share_the_prefix_only() -> None:
    requests = synthetic_requests(20, 12, 7, vocab=1 << 30, seed=3, prefix=4)
    assert {len(one.prompt) for one in requests} == {12}
    assert {one.length for one in requests} == {19}
    assert len({tuple(one.prompt[:4]) for one in requests}) == 1
    assert len({one.prompt[4] for one in requests}) == 20
    assert requests == synthetic_requests(20, 12, 7, vocab=1 << 30, seed=3, prefix=4)
    assert requests != synthetic_requests(20, 12, 7, vocab=1 << 30, seed=4, prefix=4)


def test_arrivals() -> None:
    assert arrival_times(3, None) == [0, 0, 0]
    times = arrival_times(20_000, 50.0)
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.min() >= 0
    # A Poisson process: exponential gaps, whose mean and standard deviation are both 1 / rate.
    assert gaps.mean() == pytest.approx(0.02, rel=0.03)
    assert gaps.std() == pytest.approx(0.02, rel=0.03)


def test_a_dataset_of_texts_and_ids(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"task_id": 0, "prompt": "a bb ccc", "output_tokens": 3},
        "",
        {"task_id": 1, "input_ids": [4, 49], "output_tokens": 1},
        {"task_id": 2, "logits": [0], "output_tokens": 2},
    )
    requests = [BenchRequest([1, 2, 3], 3), BenchRequest([4, 49], 1), BenchRequest([0], 2)]
    assert read_dataset(path, vocab=VOCAB, encode=encode) == requests
    assert read_dataset(path, vocab=VOCAB, encode=encode, limit=2) == requests[:2]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ([1], "line 2: '[1]' is not an object"),
        ({"prompt": "a"}, "line 2: output_tokens = None is not a positive integer"),
        ({"prompt": "a", "output_tokens": 0}, "line 2: output_tokens = 0"),
        ({"prompt": "a", "output_tokens": True}, "line 2: output_tokens = True"),
        ({"prompt": "", "output_tokens": 1}, "line 2: prompt = ''"),
        ({"output_tokens": 1}, "line 2: prompt = None"),
        ({"input_ids": [], "output_tokens": 1}, "line 2: input_ids = []"),
        ({"input_ids": [1, 50], "output_tokens": 1}, "line 2: input_ids has 50; ids of this model are 0 to 49"),
        ({"input_ids": [-1], "output_tokens": 1}, "line 2: input_ids has -1"),
        ({"input_ids": ["x"], "output_tokens": 1}, "line 2: input_ids has 'x'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = write(tmp_path, {"prompt": "a", "output_tokens": 1}, line)
    with pytest.raises(ValueError, match="dataset") as caught:
        read_dataset(path, vocab=VOCAB, encode=encode)
    assert said in str(caught.value)


def test_files_without_requests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_dataset(tmp_path / "nowhere", vocab=VOCAB, encode=encode)
    with pytest.raises(ValueError, match="has no requests"):
        read_dataset(write(tmp_path, ""), vocab=VOCAB, encode=encode)
