"""Dispatches are data: whoever has the list of them computes the same, with nothing else."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm_jax.engine.dispatch import Dispatch
from trtllm_jax.engine.request import Update
from trtllm_jax.engine.runner import Results, Runner

from .parts import Parts, requests_of_every_kind


@pytest.fixture(scope="module")
def parts(tiny_llama: Path) -> Parts:
    return Parts(tiny_llama)


def recorded(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Dispatch], list[dict[str, Any]]]:
    """What an engine dispatched for requests of every kind, and what was reported."""
    dispatches: list[Dispatch] = []
    reported: list[dict[str, Any]] = []
    run = Runner.run

    def noted(self: Runner, each: Iterable[Dispatch]) -> Results:
        several = list(each)
        dispatches.extend(several)
        results = run(self, several)
        reported.append({name: np.asarray(array) for name, array in results.items()})
        return results

    monkeypatch.setattr(Runner, "run", noted)
    left = set(requests := requests_of_every_kind())
    all_ended = threading.Event()

    def sink(updates: Sequence[Update]) -> None:
        left.difference_update(update.request for update in updates if update.finish is not None)
        if not left:
            all_ended.set()

    engine = parts.engine(sink)
    try:
        engine.submit(requests)
        assert all_ended.wait(300)
    finally:
        engine.close()
    monkeypatch.undo()
    return dispatches, reported


def test_a_recording_replayed_on_fresh_caches_gives_the_same(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatches, reported = recorded(parts, monkeypatch)
    families = {dispatch.key[0] for dispatch in dispatches}
    assert families >= {"ragged", "decode", "copy", "begin", "extras", "edited", "logits", "embeddings", "draw"}
    # As another process would get them.
    dispatches = pickle.loads(pickle.dumps(dispatches))
    runner = parts.runner()
    expected = iter([array for results in reported for array in results.values()])
    for dispatch in dispatches:
        for array in runner.read(runner.run([dispatch])).values():
            np.testing.assert_array_equal(array, next(expected))
        assert not runner._unread, "what was read is let go"
    assert next(expected, None) is None


def test_a_dispatch_holds_arrays_and_a_name(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sequence, no plan, nothing that only the engine's own process has."""
    dispatches, _ = recorded(parts, monkeypatch)
    for dispatch in dispatches:
        assert dispatch.key in parts.programs.table
        assert set(dispatch.inputs) <= set(parts.programs.table[dispatch.key].inputs)
        for name, array in dispatch.inputs.items():
            assert isinstance(array, np.ndarray)
            assert array.shape == parts.programs.table[dispatch.key].inputs[name].shape
            assert array.dtype.kind in "iuf"
