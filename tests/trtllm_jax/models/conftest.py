from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from trtllm_jax.engine.build import build_engine
from trtllm_jax.engine.config import EngineConfig
from trtllm_jax.engine.request import FinishReason, Request, Update
from trtllm_jax.engine.sampling import Sampling

from .gguf_writer import write_gguf
from .paged import Prompt
from .tiny import TinyModel

pytest.register_assert_rewrite(f"{__package__}.suite")

GREEDY = Sampling(temperature=1.0, top_k=1, top_p=1.0, min_p=0.0, seed=0, greedy=True)

Generate = Callable[[Sequence[Prompt], int], list[list[int]]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a suite's tests for every configuration of the subclass; those of engines and GGUF files for some of them."""
    if "tiny" in metafunc.fixturenames:
        slow, names = metafunc.cls.slow, metafunc.cls.configs
        names = metafunc.cls.served if "generate" in metafunc.fixturenames else names
        names = metafunc.cls.gguf if "gguf_file" in metafunc.fixturenames else names
        tinies = [pytest.param(name, marks=pytest.mark.configurations if name in slow else ()) for name in names]
        metafunc.parametrize("tiny", tinies, indirect=True, scope="class")


@pytest.fixture(scope="class")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """The tiny model of one of the class's configurations."""
    return TinyModel(request.cls.configs[request.param], tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def gguf_file(request: pytest.FixtureRequest, tiny: TinyModel, tmp_path: Path) -> Path:
    """The tiny model in llama.cpp's format."""
    name = request.node.callspec.params["tiny"]
    return write_gguf(tiny.folder, tmp_path / "model.gguf", request.cls.gguf[name])


@pytest.fixture
def generate(tiny: TinyModel) -> Iterator[Generate]:
    """generate(prompts, new) -> each prompt's greedy continuation by an engine of four rows."""
    updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
    whole = tiny.split()
    engine, _ = build_engine(
        tiny.model,
        whole.params,
        whole.mesh,
        EngineConfig(max_batch_size=4, max_num_tokens=16, max_seq_len=64, page_size=8, kv_tokens=512),
        lambda step: [updates.put(update) for update in step],
    )

    def run(prompts: Sequence[Prompt], new: int) -> list[list[int]]:
        requests = [Request(prompt, new, GREEDY) for prompt in prompts]
        engine.submit(requests)
        unfinished = set(requests)
        while unfinished:
            update = updates.get(timeout=60)
            if update.error:
                raise update.error
            if update.finish:
                assert update.finish is FinishReason.LENGTH
                unfinished.remove(update.request)
        return [request.generated for request in requests]

    yield run
    engine.close()
